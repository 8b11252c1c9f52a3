"""The benchmark of generate() where something fails: that is said and recorded, and what was measured is kept."""

import itertools

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from test_bench_generate import SMALL, calm, run  # noqa: F401 - calm is a fixture
from warpdecode.bench import decode_looks, decode_models, decode_rounds, end_to_end, variants
from warpdecode.bench.report import report

EAGER = ("--modes", "eager", "--batch", "2", "--variants")


def fails(*_, **__):
    raise torch.OutOfMemoryError("out of something")


def test_a_variant_that_fails_is_named_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variants, "_null_forward", fails)
    code, rows = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "stock,patched,null")
    assert code == 1
    assert [row.get("failed") for row in rows] == [None, None, "OutOfMemoryError: out of something"]
    assert rows[0]["of_null"] is None and rows[1]["ratio_to_stock"] > 0
    assert "null left out: OutOfMemoryError: out of something" in capsys.readouterr().err
    assert "Left out: null at batch 2 (OutOfMemoryError: out of something)." in report(tmp_path)


def test_a_step_that_was_to_be_compiled_and_was_not_is_no_figure(tmp_path, capsys):
    with torch._dynamo.config.patch(disable=True):
        code, rows = run(
            tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--modes", "static", "--batch", "2", "--variants", "null"
        )
    assert code == 1 and "torch made no graph of it" in rows[0]["failed"]
    assert "null left out: RuntimeError: its step was to be compiled" in capsys.readouterr().err


def test_a_variant_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(variants.warpdecode.hf, "patch", fails)
    code, rows = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "patched,stock")
    assert code == 1
    assert [row.get("failed") for row in rows] == ["OutOfMemoryError: out of something", None]


def test_a_variant_that_fails_in_a_later_round_is_named_and_has_no_times(tmp_path, capsys, monkeypatch):
    generate, calls = decode_rounds.generate, itertools.count(1)

    def fifth_fails(*args, **options):  # two warm up, one each; then rounds of both
        return fails() if next(calls) == 5 else generate(*args, **options)

    monkeypatch.setattr(decode_rounds, "generate", fifth_fails)
    code, rows = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "stock,null")
    assert code == 1
    assert rows[0]["failed"] == "OutOfMemoryError: out of something" and "step_ms" not in rows[0]
    assert rows[1]["step_ms"]["median"] > 0 and rows[1]["ratio_to_stock"] is None
    assert "stock left out: OutOfMemoryError: out of something" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, what, missing",
    [
        ("logits_of_another_path", "logits of another path", {"stock_logit_difference"}),
        ("read_milliseconds", "read floor", {"distinct_experts", "read_floor_ms"}),
    ],
)
def test_a_look_that_fails_costs_its_own_figures_and_not_the_times(name, what, missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode_looks, name, fails)
    code, (stock, patched) = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "stock,patched")
    assert code == 1 and not missing & set(patched)
    assert patched["not_looked_at"] == f"{what}: OutOfMemoryError: out of something"
    assert ("not_looked_at" in stock) == (what == "read floor")
    assert stock["step_ms"]["median"] > 0 < patched["step_ms"]["median"] and patched["largest_logit_difference"] >= 0
    assert f"batch 2: not looked at: {what}: OutOfMemoryError: out of something" in capsys.readouterr().err
    assert "| patched |" in report(tmp_path)


def test_kernels_that_cannot_be_recorded_cost_no_times(tmp_path, monkeypatch):
    """The profiler is there on a GPU only, so the option is put in behind its check."""
    monkeypatch.setattr(decode_rounds, "kernels_of_a_step", fails)
    settings = decode_rounds.Settings(8, 5, 1, kernels=True)
    model = decode_models.build("qwen3-30b-a3b", "cpu", **SMALL["qwen3-30b-a3b"])
    with variants.registered():
        (row,) = decode_rounds.measure(model, ["null"], "eager", 2, settings, lambda _: None)
    assert row["not_looked_at"] == "kernels: OutOfMemoryError: out of something" and row["step_ms"]["median"] > 0


def test_all_looks_that_fail_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_looks, "logits_and_distinct", fails)
    _, (_, patched) = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "stock,patched")
    why = "OutOfMemoryError: out of something"
    assert patched["not_looked_at"] == f"read floor: {why}; logits: {why}; logits of another path: {why}"
    assert 0 <= patched["equal_tokens"] <= 1


def test_logits_that_are_no_numbers_are_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(
        decode_looks, "logits_of_another_path", lambda model, text: torch.full((2, 8, 96), float("nan"))
    )
    code, (_, patched) = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *EAGER, "stock,patched")
    assert code == 1
    assert patched["not_looked_at"] == "logits of another path: ValueError: not all logits are finite numbers"


def test_a_model_that_cannot_be_built_is_named_and_the_next_one_is_measured(tmp_path, capsys, monkeypatch):
    build = decode_models.build
    monkeypatch.setattr(
        decode_models, "build", lambda name, *args, **sizes: fails() if "gemma" in name else build(name, *args, **sizes)
    )
    models = "gemma4-26b-a4b,qwen3-30b-a3b"
    argv = ["--models", models, "--device", "cpu", "--prompt-tokens", "5", "--new-tokens", "10", *EAGER, "null"]
    assert end_to_end.main(argv, SMALL["qwen3-30b-a3b"]) == 1
    printed = capsys.readouterr()
    assert "gemma4-26b-a4b left out: OutOfMemoryError: out of something" in printed.err
    assert "qwen3-30b-a3b eager batch 2 null" in printed.out


def test_a_batch_that_does_not_fit_is_named(tmp_path):
    large = 10**15
    code, rows = run(
        tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--modes", "eager", "--batch", f"{large},2", "--variants", "null"
    )
    assert code == 1 and "failed" in rows[0] and rows[1]["step_ms"]["median"] > 0


def test_that_nothing_was_compiled_is_said(tmp_path, capsys):
    argv = ["--models", "qwen3-30b-a3b", "--device", "cpu", "--prompt-tokens", "5", "--new-tokens", "10"]
    argv += ["--modes", "static", "--batch", "1,2", "--variants", "null"]
    assert end_to_end.main(argv, SMALL["qwen3-30b-a3b"]) == 0
    said = "qwen3-30b-a3b, static, batch {}: nothing was compiled: transformers did not ask for it"
    printed = capsys.readouterr().err
    assert said.format(1) in printed and said.format(2) in printed


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_a_mode_that_is_eager_or_compiled_says_nothing_of_it(mode, tmp_path, capsys):
    assert run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--modes", mode, "--batch", "2", "--variants", "null")[0] == 0
    assert "nothing was compiled" not in capsys.readouterr().err


def test_a_transformers_without_the_interface_is_said(capsys, monkeypatch):
    def none(what, since):
        raise RuntimeError(f"warpdecode: {what} needs transformers' experts interface")

    monkeypatch.setattr(variants, "demand_interface", none)
    assert end_to_end.main(["--device", "cpu"]) == 1
    said = "warpdecode: warpdecode.bench.end_to_end needs transformers' experts interface\n"
    assert capsys.readouterr().err == said
