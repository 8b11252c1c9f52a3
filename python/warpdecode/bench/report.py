"""Turns result files into the tables of README: `python -m warpdecode.bench.report notebooks/results`.

README holds what this prints, between two markers; a test compares them, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conditions(row: dict) -> str:
    """GPU or processor, versions and date of a row, as a sentence."""
    found = row["environment"]
    where = found.get("gpu") or f"{found['threads']} threads of an {found['processor']} CPU ({found['kernel']})"
    versions = ", ".join(f"{name} {found[name]}" for name in ("warpdecode", "torch", "transformers") if name in found)
    return f"{where}; {versions}; {found['date']}"


def layer_table(rows: list[dict]) -> str:
    """One layer's times beside the read ceiling and the fastest of transformers' paths."""
    first = rows[0]
    sizes = f"E{first['experts']} K{first['top_k']} H{first['hidden']} I{first['intermediate']}"
    replay = "CUDA graph replays, " if first["device"] == "cuda" else ""
    lines = [
        f"One layer, {first['shape']} ({sizes}), {first['dtype']}, {replay}cold weights, uniform routing, medians; "
        f"{conditions(first)}.",
        "",
        "| T | read ceiling, us | warpdecode, us (p10 to p90) | of the ceiling | transformers' fastest, us | ratio |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        times = row["microseconds"]
        ours, ceiling = times["warpdecode"], times["read ceiling"]["median"]
        peer = min(row["peers"], key=lambda name: times[name]["median"])
        lines.append(
            f"| {row['tokens']} | {ceiling:.1f} | {ours['median']:.1f} ({ours['p10']:.1f} to {ours['p90']:.1f}) | "
            f"{ceiling / ours['median']:.2f} | {times[peer]['median']:.0f} ({peer.split()[-1]}) | "
            f"{times[peer]['median'] / ours['median']:.2f} |"
        )
    ours = max(row["error"] / row["rounding_floor"] for row in rows)
    peers = max(max(row["peer_errors"].values()) / row["rounding_floor"] for row in rows)
    lines += [
        "",
        f"Error against FP64, in units of the output's own rounding: ours at most {ours:.3f}, transformers' paths up "
        f"to {peers:.1f}.",
    ]
    return "\n".join(lines)


def _spread(row: dict, which: str) -> str:
    speeds = row["tokens_per_second"][which]
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"


def end_to_end_table(rows: list[dict]) -> str:
    """Tokens per second of generate(), stock and patched."""
    lines = [
        f"`generate()` of {rows[0]['model']} weights, bfloat16, greedy, eager, {rows[0]['new_tokens']} new tokens, "
        f"medians of {len(rows[0]['tokens_per_second']['stock'])} rounds in turn; {conditions(rows[0])}.",
        "",
        "| batch | stock, tokens/s | patched, tokens/s | ratio | largest logit difference (deviation) |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['batch']} | {_spread(row, 'stock')} | {_spread(row, 'patched')} | "
            f"{row['speedup']:.2f} | {row['largest_logit_difference']:.3f} ({row['logit_standard_deviation']:.2f}) |"
        )
    return "\n".join(lines)


def report(folder: Path) -> str:
    """The tables of all result files in a folder."""
    parts = []
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: (path.stem == "cpu", path.stem)):
        rows = rows_of(path)
        parts.append(end_to_end_table(rows) if "model" in rows[0] else layer_table(rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
