"""The report of result files: each figure under its own conditions, and nothing vanishes."""

import json
import math

import pytest

pytest.importorskip("torch")

from warpdecode.bench import plot, row, table
from warpdecode.bench.child import INVARIANT_NAME, merge
from warpdecode.bench.measure import derived
from warpdecode.bench.report import layer_table, report
from warpdecode.bench.report import main as report_main
from warpdecode.bench.report_generate import generate_table
from warpdecode.shapes import SHAPES

ENVIRONMENT = {
    "gpu": "a GPU", "warpdecode": "1", "torch": "2", "vllm": "3", "commit": "0123456789" * 4, "date": "today",
    "threads": 8,
}  # fmt: skip
TIMES = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0}


def made_row(shape, tokens, times, distinct_bytes=10**9, apart=None, environment=(), **more):
    """A row of a GPU's result file with these medians, as `measure` makes it."""
    shape = SHAPES[shape]
    found = [name for name in times if name.split()[0] in ("transformers", "vllm")]
    row = {
        "shape": shape.name, "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden,
        "intermediate": shape.intermediate, "dtype": "bfloat16", "device": "cuda", "routing": "uniform",
        "tokens": tokens, "distinct_bytes": distinct_bytes, "peers": found, "error": 0.001, "rounding_floor": 0.001,
        "peer_errors": {name: 0.003 for name in found}, "failed": {}, "repeats": 5,
        "microseconds": {name: {"median": time, "p10": time, "p90": time} for name, time in times.items()},
        "environment": {**ENVIRONMENT, **dict(environment)}, **more,
    }  # fmt: skip
    row.update(derived(row, {name: 6e9 for name in times if "read" not in name}))
    if apart:
        row["apart"] = {}
        invariant = {"vllm_config": {"batch_invariant": True}}
        merge(row, made_row(shape.name, tokens, apart, **invariant), "vllm", INVARIANT_NAME)
    return row


def test_report_of_several_shapes():
    times = {
        "read ceiling": 80.0,
        "two reads": 90.0,
        "warpdecode": 100.0,
        "vllm": 250.0,
        "transformers batched_mm": 400.0,
    }
    prefill = {"read ceiling": 1.0, "two reads": 1.0, "warpdecode": 20.0, "vllm": 10.0, "transformers grouped_mm": 12.0}
    child = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 110.0, "vllm": 330.0}
    text = layer_table([
        made_row("qwen3-30b-a3b", 1, times, distinct_bytes=75_000_000, apart=child),
        made_row("qwen3-30b-a3b", 4, {name: time for name, time in times.items() if name != "vllm"}),
        made_row("mixtral-8x7b", 4, times, vllm_config={"table": "E=8,N=14336.json"}),
        made_row("mixtral-8x7b", 512, prefill),
    ])  # fmt: skip
    for line in (
        "2 layers, bfloat16, CUDA graph replays, cold weights, uniform routing, medians of 5; "
        "a GPU; warpdecode 1, torch 2, vllm 3; commit 0123456; today.",
        "| shape | T 1 | T 4 |",
        "| qwen3-30b-a3b | 0.80 (0.90*) | 0.80 |",
        "| mixtral-8x7b |  | 0.80 |",
        "qwen3-30b-a3b (E128 K8 H2048 I768):",
        "| 1 | 80.0 (80.0 to 80.0) | 100.0 (100.0 to 100.0) | 0.80 (0.90 of two reads) | 250.0 | 2.50 | 3.00 | "
        "400 (batched_mm) | 4.00 |",
        "| 4 | 80.0 (80.0 to 80.0) | 100.0 (100.0 to 100.0) | 0.80 | - | - | - | 400 (batched_mm) | 4.00 |",
        "vLLM's time divided by ours:",
        "| qwen3-30b-a3b | 2.50 | - |",
        "The time of vLLM, batch-invariant, divided by ours:",
        "vLLM has a table tuned for this GPU for mixtral-8x7b; its defaults for the rest.",
        "Useful TFLOP/s, ours / vLLM / transformers grouped_mm:",
        "| mixtral-8x7b | 300 / 600 / 500 |",
        "Error against FP64, in units of the output's own rounding: ours at most 1.000, transformers' paths up to 3.0, "
        "vLLM's up to 3.0.",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line


def made_step(variant="stock", batch=1, environment=(), **more):
    """A row of a decode step of generate(), as end_to_end makes it."""
    time = {"median": 10.0, "p10": 9.0, "p90": 11.0}
    return {
        "model": "a model", "layers": 2, "device": "cuda", "mode": "static", "batch": batch, "variant": variant,
        "implementation": variant, "prompt_tokens": 5, "asked_tokens": 10, "new_tokens": 10, "rounds": 3,
        "step_ms": time, "tokens_per_second": time, "generate_tokens_per_second": time, "ratio_to_stock": 1.0,
        "of_null": None, "compiled": {"graphs": 1}, "environment": {**ENVIRONMENT, **dict(environment)}, **more,
    }  # fmt: skip


def written(path, *rows):
    """A file of these rows, or of these lines as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def test_conditions_are_those_of_all_rows_of_a_table():
    """Other machines and versions have tables of their own; commits and dates are all named."""
    text = layer_table([
        made_row("olmoe-1b-7b", 1, TIMES),
        made_row("olmoe-1b-7b", 2, TIMES, repeats=3, environment={"commit": "f" * 40 + "-dirty", "date": "tomorrow"}),
        made_row("olmoe-1b-7b", 1, {**TIMES, "warpdecode": 160.0}, environment={"gpu": "another GPU"}),
        made_row("olmoe-1b-7b", 1, {**TIMES, "warpdecode": 320.0}, environment={"torch": "2.1", "commit": None}),
    ])  # fmt: skip
    how = "One layer, olmoe-1b-7b (E64 K8 H2048 I1024), bfloat16, CUDA graph replays, cold weights, uniform routing, "
    first, second, third = text.split(how)[1:]
    assert first.startswith(
        "medians of 3 to 5; a GPU; warpdecode 1, torch 2, vllm 3; commits 0123456, fffffff-dirty; today, tomorrow.\n"
    )
    assert "| 0.80 |\n| 2 |" in first and "| 0.50 |" not in first
    assert second.startswith("medians of 5; another GPU; warpdecode 1, torch 2, vllm 3; commit 0123456; today.\n")
    assert "| 0.50 |" in second
    assert third.startswith("medians of 5; a GPU; warpdecode 1, torch 2.1, vllm 3; commit unknown; today.\n")
    assert "| 0.25 |" in third


def test_steps_of_several_runs():
    text = generate_table([
        made_step(environment={"commit": "abc"}),
        made_step(batch=2, environment={"commit": "def"}),
        made_step(environment={"threads": 99}),
        made_step(asked_tokens=11),
    ])  # fmt: skip
    common = "decode steps of 3 rounds in turn, medians; a GPU in a host of"
    assert text.count(common) == 3 and text.count(" and 11 new ones, ") == 1
    assert f"{common} 8 threads; warpdecode 1, torch 2, vllm 3; commits abc, def; today.\n" in text
    assert f"{common} 99 threads; " in text


@pytest.mark.parametrize(
    ("graphs", "label"), [((1, 1), "compiled"), ((0, 0), "not compiled"), ((1, 0), "compiled in part")]
)
def test_a_static_cache_is_called_compiled_where_it_was(graphs, label):
    rows = [made_step(name, compiled={"graphs": count}) for name, count in zip(("stock", "null"), graphs, strict=True)]
    assert f"static cache ({label}), 5 prompt" in generate_table([*rows, {**made_step("read"), "failed": "so"}])


def test_what_was_not_looked_at_is_named():
    rows = [made_step(name, not_looked_at="no memory") for name in ("stock", "patched")]
    assert generate_table(rows).endswith("\n\nNot looked at behind the timing: no memory.")


def test_a_step_s_aim_needs_no_row_of_a_variant_that_failed():
    looked = {"read_floor_ms": 2.0, "distinct_experts": 4.0}
    failed = {key: value for key, value in made_step("stock").items() if "step_ms" not in key} | {"failed": "so"}
    text = generate_table([failed, made_step("null", **looked), made_step("patched", **looked)])
    assert "batch 1 (4.0 experts a layer) 12.00 ms, of which ours is 1.20." in text
    assert text.endswith("\n\nLeft out: stock at batch 1 (so).")


@pytest.mark.parametrize("make", [lambda: made_row("olmoe-1b-7b", 4, TIMES), made_step])
def test_the_same_row_twice_is_refused(make, tmp_path, capsys):
    """A command that was run twice with one --output: the last row won, under the first one's date."""
    again = make()
    again["environment"] = {**again["environment"], "date": "later", "commit": "abc"}
    path = written(tmp_path / "rows.jsonl", make(), again)
    assert report_main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{path}: 2 rows are of " in said and "commits 0123456, abc; later, today" in said
    if "shape" in again:
        assert "shape olmoe-1b-7b, dtype bfloat16, device cuda, routing uniform, tokens 4, expected one: a GPU" in said
        assert plot.main([str(path), str(tmp_path / "out.png")]) == 1
        assert "2 rows are of shape olmoe-1b-7b" in capsys.readouterr().err


@pytest.mark.parametrize("error", [math.nan, None])
def test_an_error_that_is_no_number_is_shown(error):
    rows = [made_row("olmoe-1b-7b", 1, {**TIMES, "vllm": 200.0}), made_row("olmoe-1b-7b", 2, {**TIMES, "vllm": 200.0})]
    rows[1].update(error=error, peer_errors={"vllm": error})
    assert layer_table(rows).endswith(": ours at most nan, vLLM's up to nan.")
    assert row.largest([1.0, 3.0, 2.0]) == 3.0
    columns = table.columns([], parts=False, peers=[])
    assert table.line(columns, rows[1]).endswith(" nan") and table.line(columns, rows[0]).endswith(" 1.000")
    steps = [
        made_step("patched", 1, largest_logit_difference=0.5, logit_standard_deviation=1.0),
        made_step("patched", 2, largest_logit_difference=error, logit_standard_deviation=error),
    ]
    assert "largest difference nan, where their standard deviation is nan." in generate_table(steps)


def test_routings_are_compared_where_both_are_there():
    text = layer_table([
        made_row("olmoe-1b-7b", 8, TIMES, same_bits_alone=True),
        made_row("olmoe-1b-7b", 64, {**TIMES, "warpdecode": 200.0}, same_bits_alone=False),
        made_row("olmoe-1b-7b", 8, {**TIMES, "warpdecode": 70.0}, routing="zipf"),
        made_row("olmoe-1b-7b", 64, {**TIMES, "warpdecode": 206.0}, routing="zipf"),
        made_row("olmoe-1b-7b", 256, TIMES, routing="zipf"),  # no even one to compare with
        made_row("olmoe-1b-7b", 8, {**TIMES, "warpdecode": 50.0}, routing="same"),
        made_row("olmoe-1b-7b", 8, {**TIMES, "warpdecode": 90.0}, routing="zipf", environment={"gpu": "another"}),
        made_row("olmoe-1b-7b", 1, TIMES, same_bits_alone=True),  # nothing is compared there
    ])  # fmt: skip
    heads = "| shape | T 8 | T 64 |\n|:--|--:|--:|"
    title = "bfloat16, our time with {} routing divided by that with uniform routing; a GPU; warpdecode 1, torch 2, "
    title += "vllm 3; commit 0123456; today:\n\n"
    assert f"{title.format('zipf')}{heads}\n| olmoe-1b-7b | 0.70 | 1.03 |" in text
    assert f"{title.format('same')}| shape | T 8 |\n|:--|--:|\n| olmoe-1b-7b | 0.50 |" in text
    assert text.count("divided by that with uniform") == 2
    assert text.count("A token alone has its batch's bits in 1 of 2 rows.") == 1 == text.count("A token alone")


def test_eager_calls_are_shown_beside_replays():
    spread = {"median": 130.0, "p10": 120.0, "p90": 140.0}
    times = {**TIMES, "vllm": 200.0, "vllm batch-invariant": 300.0}
    rows = [
        made_row("olmoe-1b-7b", 1, times, eager_microseconds={"warpdecode": 125.0, "vllm": 220.0}),  # an early row
        made_row("olmoe-1b-7b", 4, times, eager_microseconds={"warpdecode": spread}),
    ]
    text = layer_table(rows)
    for line in (
        "| shape | path | T 1 | T 4 |",
        "| olmoe-1b-7b | warpdecode | 125.0 / 100.0 | 130.0 (120.0 to 140.0) / 100.0 |",
        "| olmoe-1b-7b | vllm | 220.0 / 200.0 | - |",
    ):
        assert f"\n{line}\n" in text
    assert "; a GPU in a host of 8 threads; " in text and "| path |" not in layer_table(rows, short=True)
    heads = table.columns([], parts=False, peers=[], eager=True)
    assert " eager " in table.heading(heads) and " 130.0   (120.0-140.0) " in table.line(heads, rows[1])
    assert " eager " not in table.heading(table.columns([], parts=False, peers=[]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "is {}; a row"),
        ("3", "is 3; a row"),
        ("null", "is null; a row"),
        ('{"model": "a", "environment": 1}', "has no layers, device, mode"),
        ('{"microseconds": {}, "shape": "a"}', "has no dtype, device, routing, tokens, environment; a row"),
        ('{"shape": "ol{"shape": "olmoe-1b-7b"}', "is not JSON"),  # behind an interrupted write
    ],
)
def test_a_line_that_is_no_row_is_named(line, said, tmp_path, capsys):
    path = written(tmp_path / "rows.jsonl", made_row("olmoe-1b-7b", 4, TIMES), "", line)
    for run in (lambda: report_main([str(tmp_path)]), lambda: plot.main([str(path), str(tmp_path / "out.png")])):
        assert run() == 1 and f"{path}, line 3 {said}" in capsys.readouterr().err


def test_a_file_of_all_kinds_of_rows(tmp_path, capsys):
    """Each is in its own table, whatever the first one is; empty lines are none."""
    layouts = {**TIMES, "layout transposed": 125.0}
    rows = [
        made_step(),
        made_row("olmoe-1b-7b", 4, layouts, layouts=["transposed"]),
        "",
        made_row("olmoe-1b-7b", 4, TIMES),
        made_row("olmoe-1b-7b", 1, TIMES, distinct_bytes=75_000_000),
    ]
    path = written(tmp_path / "rows.jsonl", *rows)
    text = report(path)
    assert text == report(tmp_path)
    starts = ["One layer, olmoe-1b-7b", "`generate()`, a model, 2 layers", "Other layouts of the same bytes"]
    assert [text.count(start) for start in starts] == [1, 1, 1]
    assert [text.index(start) for start in starts] == sorted(text.index(start) for start in starts)
    assert text.startswith(starts[0]) and "| olmoe-1b-7b | transposed | 0.80 (0.64) |" in text
    assert plot.main([str(path), str(tmp_path / "out.png")]) == 0
    assert "rows of generate() that are not drawn: 1\n" in capsys.readouterr().err
    assert len(plot.plot([each for each in rows if "shape" in each]).axes) == 4
    assert report_main([str(written(tmp_path / "none.jsonl"))]) == 1
    assert "none.jsonl has no rows of the benchmark" in capsys.readouterr().err
