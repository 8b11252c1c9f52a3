"""The layer benchmark: what it measures is there, and makes sense."""

import json

import pytest

pytest.importorskip("transformers")

from warpdecode.bench.report import report
from warpdecode.cli import main

PEERS = ["transformers eager", "transformers grouped_mm", "transformers batched_mm"]


def rows_of(path):
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_on_the_cpu(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    options = [
        "--shapes",
        "granite-3b",
        "--tokens",
        "1,3",
        "--repeats",
        "3",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    assert main(["bench", *options, "--kernels", "cpu_generic"]) == 0
    rows = rows_of(output)
    assert [row["tokens"] for row in rows] == [1, 3]
    for row in rows:
        assert row["peers"] == PEERS
        times = row["microseconds"]
        assert set(times) == {"warpdecode", "cpu_generic", "read ceiling", "two reads", *PEERS}
        assert all(0 < time["p10"] <= time["median"] <= time["p90"] for time in times.values())
        assert row["distinct_bytes"] <= row["gross_bytes"] == row["tokens"] * 8 * 3 * 1536 * 512 * 2
        assert row["error"] <= 1.02 * row["rounding_floor"] < min(row["peer_errors"].values())
        assert row["environment"]["kernel"].startswith("cpu_")
    printed = capsys.readouterr().out
    assert "granite-3b (E40 K8 H1536 I512), bfloat16, uniform routing, cpu" in printed
    assert report(tmp_path).count("\n| ") >= 3


def test_unknown_shape_is_refused(capsys):
    assert main(["bench", "--shapes", "granite-3b,nosuch"]) == 2
    assert "--shapes was nosuch, expected qwen3-30b-a3b" in capsys.readouterr().err


@pytest.mark.gpu
def test_rows_on_cuda(cuda, tmp_path):
    output = tmp_path / "rows.jsonl"
    options = ["--shapes", "granite-3b", "--tokens", "2", "--repeats", "3", "--device", "cuda", "--output", str(output)]
    assert main(["bench", *options, "--dtypes", "bfloat16,float16", "--routing", "zipf"]) == 0
    assert [row["dtype"] for row in rows_of(output)] == ["bfloat16", "float16"]
