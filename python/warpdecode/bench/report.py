"""Turns result files into tables: `python -m warpdecode.bench.report notebooks/results [--short]`.

README holds what this prints with --short, between two markers, and README.md beside the files holds all of it; a test
compares them, so that no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warpdecode.bench.report_generate import generate_table
from warpdecode.bench.report_layouts import layouts_table
from warpdecode.bench.report_parts import conditions, grouped, markdown, rows_of
from warpdecode.bench.table import SMALL_BYTES, fastest

LONG = 512  # tokens from which a row is of a prompt, not of decode steps: its figure is TFLOP/s
INVARIANT = "vllm batch-invariant"


def layer_table(rows: list[dict], short: bool = False) -> str:
    """The layers' times beside the read ceilings and the peers: a part for each dtype, device and routing.

    short: without the table of vLLM's batch-invariant mode.
    """
    return "\n\n".join(_section(part, short) for part in grouped(rows, "dtype", "device", "routing").values())


def _section(rows: list[dict], short_report: bool) -> str:
    first, shapes = rows[0], grouped(rows, "shape")
    replay = "CUDA graph replays, " if first["device"] == "cuda" else ""
    how = f"{first['dtype']}, {replay}cold weights, {first['routing']} routing, medians; {conditions(first)}."
    short = [row for row in rows if row["tokens"] < LONG]
    long = [row for row in rows if row["tokens"] >= LONG]
    headline = [row for row in short if row["shape"] == first["shape"]]
    if len(shapes) == 1:
        parts = [f"One layer, {_sizes(first)}, {how}"]
    else:
        parts = [f"{len(shapes)} layers, {how}"]
        if short:
            mark = ", * of two reads where a call reads less than 100 MB" if any(map(_is_small, short)) else ""
            parts += [f"Fraction of the read ceiling{mark}:", _by_tokens(short, _headline_fraction)]
        if headline:
            parts.append(f"{_sizes(first)}:")
    if headline:
        parts.append(_times(headline))
    if len(shapes) > 1:
        for name, title in (("vllm", "vLLM's time"), (INVARIANT, "The time of vLLM, batch-invariant,")):
            left_out = short_report and name == INVARIANT
            if not left_out and any(name in row["microseconds"] for row in short):
                parts += [f"{title} divided by ours:", _by_tokens(short, lambda row, name=name: _ratio(row, name))]
    if any("vllm_config" in row for row in rows):
        parts.append(_tables_of_vllm(rows))
    if long:
        peers = [name for name in ("vllm", "transformers grouped_mm") if any(name in row["tflops"] for row in long)]
        named = " / ".join(["ours", *(_shown(name) for name in peers)])
        parts += [f"Useful TFLOP/s, {named}:", _by_tokens(long, lambda row: _speeds(row, ["warpdecode", *peers]))]
    return "\n\n".join([*parts, _errors(rows)])


def _tables_of_vllm(rows: list[dict]) -> str:
    """Which shapes vLLM has tuned for this GPU: where it has not, its defaults are what was timed."""
    found = {row["shape"]: row["vllm_config"].get("table") for row in rows if "vllm_config" in row}
    tuned = [shape for shape, table in found.items() if table]
    return f"vLLM has a table tuned for this GPU for {', '.join(tuned) or 'none of them'}; its defaults for the rest."


def _sizes(row: dict) -> str:
    return f"{row['shape']} (E{row['experts']} K{row['top_k']} H{row['hidden']} I{row['intermediate']})"


def _shown(peer: str) -> str:
    return peer.replace("vllm", "vLLM")


def _by_tokens(rows: list[dict], cell) -> str:
    """A table of shapes by numbers of tokens."""
    columns = sorted({row["tokens"] for row in rows})
    lines = []
    for (shape,), part in grouped(rows, "shape").items():
        by_tokens = {row["tokens"]: row for row in part}
        lines.append([shape, *(cell(by_tokens[tokens]) if tokens in by_tokens else "" for tokens in columns)])
    return markdown(["shape", *(f"T {tokens}" for tokens in columns)], lines, first=":--")


def _median(row: dict, name: str) -> float:
    return row["microseconds"][name]["median"]


def _is_small(row: dict) -> bool:
    return "of_two_reads" in row and row["distinct_bytes"] < SMALL_BYTES


def _headline_fraction(row: dict) -> str:
    if _is_small(row):
        return f"{row['of_two_reads']:.2f}*"
    return f"{_median(row, 'read ceiling') / _median(row, 'warpdecode'):.2f}"


def _ratio(row: dict, name: str | None) -> str:
    if name is None or name not in row["microseconds"]:
        return "-"
    stored = row.get("ratios", {})  # taken side by side where the peer ran in a process of its own
    return f"{stored.get(name, _median(row, name) / _median(row, 'warpdecode')):.2f}"


def _speeds(row: dict, names: list[str]) -> str:
    return " / ".join(f"{row['tflops'][name]:.0f}" if name in row["tflops"] else "-" for name in names)


def _times(rows: list[dict]) -> str:
    """One shape: times of the ceiling, of ours and of the peers, T by T."""
    some = {name for row in rows for name in row["peers"]}
    heads = ["T", "read ceiling, us", "warpdecode, us (p10 to p90)", "of the ceiling"]
    heads += ["vLLM, us", "ratio"] if "vllm" in some else []
    heads += ["vLLM batch-invariant, ratio"] if INVARIANT in some else []
    transformers = any(name.split()[0] == "transformers" for name in some)
    heads += ["transformers' fastest, us", "ratio"] if transformers else []
    lines = []
    for row in rows:
        ours, ceiling = row["microseconds"]["warpdecode"], _median(row, "read ceiling")
        two = f" ({row['of_two_reads']:.2f} of two reads)" if _is_small(row) else ""
        cells = [
            str(row["tokens"]),
            f"{ceiling:.1f}",
            f"{ours['median']:.1f} ({ours['p10']:.1f} to {ours['p90']:.1f})",
            f"{ceiling / ours['median']:.2f}{two}",
        ]
        if "vllm" in some:
            cells += [f"{_median(row, 'vllm'):.1f}" if "vllm" in row["peers"] else "-", _ratio(row, "vllm")]
        if INVARIANT in some:
            cells.append(_ratio(row, INVARIANT))
        if transformers:
            peer = fastest(row, "transformers")
            cells += [f"{_median(row, peer):.0f} ({peer.split()[-1]})" if peer else "-", _ratio(row, peer)]
        lines.append(cells)
    return markdown(heads, lines)


def _errors(rows: list[dict]) -> str:
    """The largest errors of the rows, ours and each package's."""
    ours = max(row["error"] / row["rounding_floor"] for row in rows)
    found = [f"ours at most {ours:.3f}"]
    for package, whose in (("transformers", "transformers' paths"), ("vllm", "vLLM's")):
        errors = [
            error / row["rounding_floor"]
            for row in rows
            for name, error in row["peer_errors"].items()
            if name.split()[0] == package
        ]
        if errors:
            found.append(f"{whose} up to {max(errors):.1f}")
    return f"Error against FP64, in units of the output's own rounding: {', '.join(found)}."


def _kind(rows: list[dict]) -> int:
    """Decode steps of layers, of models, long calls, other layouts, the CPU: the order of the report."""
    first = rows[0]
    if first["device"] == "cpu":
        return 4
    if "model" in first:
        return 1
    return 3 if first.get("layouts") else 2 if first["tokens"] >= LONG else 0


def report(folder: Path, short: bool = False) -> str:
    """The tables of all result files in a folder. short: README's, without vLLM batch-invariant and layouts.

    Raises ValueError for a folder without a row and for a line that is none.
    """
    parts, files = [], [rows_of(path) for path in sorted(folder.glob("*.jsonl"))]
    files = [rows for rows in files if rows]  # a run that was interrupted before its first row leaves an empty one
    if not files:
        raise ValueError(f"{folder} has no .jsonl file with rows of the benchmark")
    for rows in sorted(files, key=_kind):
        if "model" in rows[0]:
            parts.append(generate_table(rows))
        elif not rows[0].get("layouts"):
            parts.append(layer_table(rows, short))
        elif not short:
            parts.append(layouts_table(rows))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m warpdecode.bench.report", description="Tables of result files.")
    parser.add_argument("folder", type=Path, help="where the .jsonl files lie")
    parser.add_argument("--short", action="store_true", help="as README has them")
    args = parser.parse_args(argv)
    try:
        print(report(args.folder, args.short))
    except (OSError, ValueError) as error:
        print(f"warpdecode.bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
