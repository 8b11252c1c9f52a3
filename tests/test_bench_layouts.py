"""The benchmark's other layouts: they are what their names say, of the standard layout's memory."""

import json
import math

import pytest

pytest.importorskip("torch")

import torch

import warpdecode
from test_bench_report import made_row
from warpdecode.bench import layouts
from warpdecode.bench.layers import Layers
from warpdecode.bench.measure import derived
from warpdecode.bench.report import report
from warpdecode.bench.report_layouts import layouts_table
from warpdecode.cli import main
from warpdecode.shapes import Shape

SHAPE = Shape("tiny", 6, 2, 40, 24, "gelu_tanh")


def standard(layout, gate_up, down, arrays):
    """(gate_up_proj, down_proj, keywords) of the standard layout with the numbers that a layout reads."""
    experts, hidden, intermediate = down.shape
    keywords = {}
    if layout in ("transposed", "gpt-oss", "llama-4"):
        gate_up = gate_up.reshape(experts, hidden, 2 * intermediate).transpose(1, 2)
        down = down.reshape(experts, intermediate, hidden).transpose(1, 2)
    if layout in ("interleaved", "gpt-oss"):
        gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
    if layout == "gpt-oss":
        bias = arrays["gate_up_bias"]
        keywords["gate_up_bias"] = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1).contiguous()
        keywords["down_bias"] = arrays["down_bias"]
    if layout == "separate":
        gate_up = torch.cat([*gate_up.reshape(2, experts, intermediate, hidden)], dim=1)
    return gate_up.contiguous(), down.contiguous(), keywords


@pytest.mark.parametrize("layout", layouts.NAMES)
def test_a_layout_reads_the_same_memory_as_its_name_says(layout):
    layers = Layers(SHAPE, torch.bfloat16, "cpu", 1 << 12, seed=3)
    found = layouts.described(layers, layout)
    assert len(found) == layers.copies >= 2
    x, ids, weights = layers.inputs(5, "uniform", lambda _: 1)[0]
    for experts, gate_up, down in zip(found, layers.gate_up, layers.down, strict=True):
        first = experts.gate_up_proj[0]
        assert first.data_ptr() == gate_up.data_ptr() and experts.down_proj[0].data_ptr() == down.data_ptr()
        plain_gate_up, plain_down, keywords = standard(layout, gate_up, down, experts._arrays)
        keywords["activation"] = SHAPE.activation
        if layout == "gpt-oss":
            keywords.update(activation="silu", alpha=1.702, limit=7.0, up_offset=1.0)
        expected = warpdecode.Experts(plain_gate_up, plain_down, weight_on_input=layout == "llama-4", **keywords)
        assert torch.equal(experts(x, ids, weights), expected(x, ids, weights))
        unchanged = warpdecode.Experts(gate_up, down, activation=SHAPE.activation)(x, ids, weights)
        assert torch.equal(experts(x, ids, weights), unchanged) == (layout == "pointers")


def test_rows_of_layouts_on_the_cpu(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    options = ["--tokens", "1,2", "--device", "cpu", "--repeats", "3", "--peers", "none", "--no-parts"]
    assert main(["bench", "--shapes", "granite-3b", *options, "--layouts", "all", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        assert row["layouts"] == list(layouts.NAMES) and row["failed"] == {}
        times = row["microseconds"]
        for name in layouts.NAMES:
            mine = times["warpdecode"]["median"] / times[f"layout {name}"]["median"]
            assert math.isclose(row["layout_ratios"][name], mine) and mine > 0
    heading = next(line for line in capsys.readouterr().out.splitlines() if "dist. MB" in line)
    assert all(name in heading for name in layouts.NAMES)
    assert report(tmp_path).count("\n| granite-3b | ") == 1 + len(layouts.NAMES)


def test_report_of_layouts():
    times = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0, "layout transposed": 125.0}
    rows = [made_row("gpt-oss-20b", 1, times, distinct_bytes=75_000_000), made_row("gpt-oss-20b", 4, times)]
    rows.append(made_row("llama-4-scout", 4, {**times, "layout interleaved": 100.0}))
    for row in rows:
        row["layouts"] = [name for name in layouts.NAMES if f"layout {name}" in row["microseconds"]]
        row.update(derived(row, {}))
    text = layouts_table(rows)
    assert text.startswith(
        "Other layouts of the same bytes, bfloat16, CUDA graph replays, cold weights, uniform routing, medians of 5; a "
        "GPU; warpdecode 1, torch 2, vllm 3; commit 0123456; today. The standard layout's fraction of the read "
        "ceiling, * of two reads where a call reads less than 100 MB; the standard"
    )
    for line in (
        "| shape | layout | T 1 | T 4 |",
        "| gpt-oss-20b | standard | 0.80, 0.90* | 0.80 |",
        "| gpt-oss-20b | transposed | 0.80 (0.64, 0.72*) | 0.80 (0.64) |",
        "| llama-4-scout | standard |  | 0.80 |",
        "| llama-4-scout | interleaved |  | 1.00 (0.80) |",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line
