"""The benchmark of generate(): each variant runs what it says, and a row says what was measured."""

import json
import math
import random
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

import warpdecode
import warpdecode.hf
from warpdecode.bench import end_to_end, generation, reading, variants
from warpdecode.bench.decode_floor import logits_of_another_path
from warpdecode.bench.random_models import MODELS, build, twin
from warpdecode.bench.report import report
from warpdecode.bench.variant_names import DEFAULT, STOCK
from warpdecode.hf.registries import ExpertsInterface
from warpdecode.shapes import SHAPES

if ExpertsInterface is None:
    pytest.skip("transformers 4 has no experts interface", allow_module_level=True)

_SMALL = {
    "num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32,
}  # fmt: skip
SMALL = {
    "qwen3-30b-a3b": {**_SMALL, "num_experts_per_tok": 2},
    "gemma4-26b-a4b": {
        **_SMALL, "top_k_experts": 2, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def calm():
    """torch warns of every cached function of transformers that it traces; and such small models need no threads, which
    a busy machine makes them wait for."""
    threads, ours = torch.get_num_threads(), warpdecode.get_num_threads()
    torch.set_num_threads(1)
    warpdecode.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield
    torch.set_num_threads(threads)
    warpdecode.set_num_threads(ours)
    torch._dynamo.reset()


def run(output, model, *more, device="cpu"):
    """The command on a small model; a static cache is compiled on the CPU, too, without generating code."""
    compiled = None
    if device == "cpu":
        compiled = CompileConfig(backend="eager", mode=None)
        compiled._compile_all_devices = True  # transformers compiles on GPUs alone, otherwise
    argv = [
        "--models", model, "--device", device, "--prompt-tokens", "5", "--new-tokens", "10", "--output", str(output),
        "--commit", "abc", "--seconds", "1000", *more,
    ]  # fmt: skip
    code = end_to_end.main(argv, SMALL[model], compiled)
    return code, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def check_times(row):
    """A row's figures agree with one another."""
    assert 0 < row["step_ms"]["p10"] <= row["step_ms"]["median"] <= row["step_ms"]["p90"]
    assert math.isclose(row["tokens_per_second"]["median"] * row["step_ms"]["median"], 1e3 * row["batch"], rel_tol=0.05)
    assert min(row[key]["median"] for key in ("generate_tokens_per_second", "first_token_ms")) > 0
    assert row["new_tokens"] == row["asked_tokens"] == 10 and row["rounds"] == 3 and row["prompt_tokens"] == 5
    assert row["layers"] == 2 and row["environment"]["commit"] == "abc"
    assert 2 <= row["distinct_experts"] <= min(8, 2 * row["batch"]) and row["read_floor_ms"] > 0


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_both_modes(model, tmp_path, capsys):
    batch = "1,3" if model.startswith("qwen") else "2"
    code, rows = run(tmp_path / "rows.jsonl", model, "--batch", batch)
    assert code == 0
    expected = [
        (mode, int(text), name) for mode in ("static", "eager") for text in batch.split(",")
        for name in DEFAULT[mode]
    ]  # fmt: skip
    assert [(row["mode"], row["batch"], row["variant"]) for row in rows] == expected
    # generate() switches stock to batched_mm on GPUs alone
    ran = {"stock": "grouped_mm", "eager": "eager", "grouped_mm": "grouped_mm", "patched": "warp_decode"}
    for row in rows:
        check_times(row)
        assert row["implementation"] == ran.get(row["variant"], row["variant"])
        others = {
            each["variant"]: each for each in rows if (each["mode"], each["batch"]) == (row["mode"], row["batch"])
        }
        step = row["step_ms"]["median"]
        stock = min(each["step_ms"]["median"] for name, each in others.items() if name in STOCK)
        assert others[row["fastest_stock"]]["step_ms"]["median"] == stock
        assert math.isclose(row["ratio_to_stock"], stock / step)
        assert math.isclose(row["of_null"], others["null"]["step_ms"]["median"] / step)
        assert ("largest_logit_difference" in row) == (row["variant"] == "patched")
        if row["variant"] == "patched":
            assert row["largest_logit_difference"] >= 0 < row["logit_standard_deviation"]
            assert math.isfinite(row["stock_logit_difference"])
            assert 0 <= row["equal_tokens"] <= 1
        if row["mode"] == "static":  # each batch anew, in one piece, and nothing of it while times were taken
            assert row["compiled"]["graphs"] in (1, 2) and row["compiled"]["graph_breaks"] == 0
            assert row["graphs_while_timed"] == 0
        else:
            assert row["compiled"] is None
    printed = capsys.readouterr()
    assert f"{model} static batch {batch[0]} patched (warp_decode): " in printed.out
    assert f"{model}, static, batch {batch[0]}: null warm after " in printed.err
    text = report(tmp_path)
    assert f"`generate()`, {model}, 2 layers of random weights, bfloat16, greedy, static cache (compiled), 5" in text
    assert text.count("\n| ") == len(rows) + 2


def test_sizes_are_those_of_the_layers_that_figures_are_published_for():
    for name, make in MODELS.items():
        kind, config = make()
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.bfloat16)
        experts, shape = variants.experts_of(model), SHAPES[name]
        assert len(experts) == config.num_hidden_layers
        for each in experts:
            assert each.gate_up_proj.shape == (shape.experts, 2 * shape.intermediate, shape.hidden)
            assert each.down_proj.shape == (shape.experts, shape.hidden, shape.intermediate)


def test_twins_share_tensors_and_nothing_else():
    model = build("qwen3-30b-a3b", "cpu", **SMALL["qwen3-30b-a3b"])
    other = twin(model)
    tensors = list(zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert tensors and all(a.data_ptr() == b.data_ptr() for a, b in tensors)
    other.set_experts_implementation("eager")
    assert model.get_experts_implementation() == {"": "grouped_mm"}


def test_null_experts_run_no_experts():
    model = build("qwen3-30b-a3b", "cpu", **SMALL["qwen3-30b-a3b"])
    tokens = torch.arange(6).view(2, 3)
    with variants.registered(), torch.no_grad():
        names = ("stock", "eager", "grouped_mm", "batched_mm", "patched", "null", "read")
        models = {name: variants.model_of(model, name) for name in names}
        for experts in variants.experts_of(model):
            experts.gate_up_proj.fill_(float("nan"))
        logits = {name: each(tokens).logits for name, each in models.items()}
    null = logits.pop("null")
    assert torch.isfinite(null).all() and torch.equal(logits.pop("read"), null)
    assert all(found.isnan().all() for found in logits.values())
    assert not [name for name in variants.FORWARD if name.startswith("warpdecode_bench")]


def test_null_experts_keep_the_router_in_compiled_code():
    def step(hidden_states, logits):
        weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), 4, -1)
        return variants._null_forward(None, hidden_states, ids, weights / weights.sum(-1, keepdim=True))

    hidden_states = torch.randn(3, 32, dtype=torch.bfloat16)
    found, code = run_and_get_code(torch.compile(step, fullgraph=True), hidden_states, torch.randn(3, 16))
    assert "topk" in "".join(code)
    torch.testing.assert_close(found, hidden_states)


def test_experts_that_read_read_what_a_step_reads(tmp_path, monkeypatch):
    sizes = []
    read_memory = reading.read_memory
    monkeypatch.setattr(
        reading, "read_memory", lambda memory, sink: sizes.append(tuple(memory.shape)) or read_memory(memory, sink)
    )
    code, (row,) = run(
        tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--modes", "static", "--batch", "3", "--variants", "read"
    )
    assert code == 0 and row["implementation"] == "read" and row["compiled"]["graph_breaks"] == 0
    met = reading.experts_met(8, 2, 3)
    assert met == 5  # 8 (1 - 0.75^3) = 4.6
    assert set(sizes[-4:]) == {(met, 64, 64), (met, 64, 32)}  # a step of two layers


def test_as_many_experts_are_met_as_draws_meet():
    drawn = [len({e for _ in range(8) for e in random.sample(range(32), 4)}) for _ in range(2000)]
    assert reading.experts_met(32, 4, 8) == round(sum(drawn) / len(drawn))  # 21.00: give or take 0.04
    assert reading.experts_met(32, 4, 1) == 4 and reading.experts_met(8, 8, 5) == 8


def test_reading_is_an_operator():
    weights = torch.randn(4, 16, 8), torch.randn(4, 8, 8)
    torch.library.opcheck(torch.ops.warpdecode_bench.read_experts.default, (torch.randn(2, 8), *weights, 2))


def test_a_generation_is_timed_token_by_token():
    model = build("qwen3-30b-a3b", "cpu", **SMALL["qwen3-30b-a3b"])
    found = generation.generate(model, torch.randint(0, 96, (2, 5)), 7, static=False)
    assert found.tokens.shape == (2, 12) and len(found.steps) == 6 and found.ran == "grouped_mm"
    assert 0 < found.first + sum(found.steps) <= found.seconds


def test_slow_variants_generate_fewer_tokens(tmp_path):
    _, rows = run(
        tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--modes", "eager", "--batch", "2", "--variants", "stock",
        "--seconds", "1e-9",
    )  # fmt: skip
    assert rows[0]["new_tokens"] == 8 and rows[0]["asked_tokens"] == 10
    assert "| 1.00 | - | - |" in report(tmp_path) and " and 10 new ones" in report(tmp_path)


@pytest.mark.gpu
def test_rows_on_cuda(cuda, tmp_path):
    assert warpdecode.cuda_usable()[0]
    code, rows = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", "--batch", "2", device="cuda")
    assert code == 0
    for row in rows:
        check_times(row)
        ran = {"stock": "batched_mm", "patched": "warp_decode"}.get(row["variant"], row["variant"])
        assert row["implementation"] == ran
        if row["mode"] == "static":
            assert row["compiled"]["graphs"] == 1 and row["compiled"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_kernels_of_a_step_on_cuda(cuda, tmp_path, capsys):
    """Ours are launched once a layer, by the patched variant alone, whether or not the step is compiled."""
    assert warpdecode.cuda_usable()[0]
    more = ("--batch", "2", "--variants", "stock,patched", "--kernels")
    code, rows = run(tmp_path / "rows.jsonl", "qwen3-30b-a3b", *more, device="cuda")
    assert code == 0 and len(rows) == 4
    for row in rows:
        kernels = row["kernels"]
        launches = {kernel["name"]: kernel["launches"] for kernel in kernels["longest"]}
        times = [kernel["microseconds"] for kernel in kernels["longest"]]
        assert times == sorted(times, reverse=True) and 0 < 1e-3 * sum(times) <= kernels["busy_ms"]
        ours = {name: count for name, count in launches.items() if name in ("gate_up_direct", "down_direct")}
        if row["variant"] == "patched":
            assert ours == {"gate_up_direct": row["layers"], "down_direct": row["layers"]}
        else:
            assert not ours
    assert "launches a step: gate_up_direct" in capsys.readouterr().out


@torch.no_grad()
def test_how_far_logits_of_a_random_deep_gemma_are_apart_says_nothing_of_the_kernels():
    """In bfloat16 two of transformers' own paths are far apart, too; in float32 ours and theirs are not."""
    sizes = {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "vocab_size_per_layer_input": 1000,
    }  # fmt: skip
    model = build("gemma4-26b-a4b", "cpu", **sizes)
    text = torch.randint(0, 1000, (1, 48))

    def logits(implementation):
        model.set_experts_implementation(implementation)
        return model(text).logits.float()

    def apart(one, other):
        return ((one - other).abs().max() / one.std()).item()

    eager = logits("eager")
    own = apart(eager, logits("batched_mm"))
    with warpdecode.hf.patched(model, strict=True):
        assert apart(eager, model(text).logits.float()) < 3 * own
    model.float()
    eager = logits("eager")
    with warpdecode.hf.patched(model, strict=True):
        assert apart(eager, model(text).logits) < own / 10


@pytest.mark.parametrize(("own", "other"), [("grouped_mm", "eager"), ("eager", "grouped_mm")])
def test_another_of_transformers_paths_is_asked_for_its_logits(own, other):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 100}
    model = build("qwen3-30b-a3b", "cpu", num_hidden_layers=2, num_experts=8, **sizes)
    model.set_experts_implementation(own)
    experts, ran = variants.experts_of(model)[0], []
    experts.register_forward_pre_hook(lambda module, _: ran.append(variants.running(module)))
    logits = logits_of_another_path(model, torch.randint(0, 100, (2, 12)))
    assert ran == [other] and variants.running(experts) == own
    assert logits.dtype is torch.float32 and torch.isfinite(logits).all()
