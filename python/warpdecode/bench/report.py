"""Turns result files into tables: `python -m warpdecode.bench.report notebooks/results [--short]`.

README holds what this prints with --short, between two markers, and README.md beside the files holds all of it; a test
compares them, so that no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warpdecode.bench.child import INVARIANT_NAME
from warpdecode.bench.command import command
from warpdecode.bench.report_generate import generate_table
from warpdecode.bench.report_layouts import layouts_table
from warpdecode.bench.report_parts import by_tokens, grouped, markdown, measured, rows_of, sections
from warpdecode.bench.report_routing import routing_tables
from warpdecode.bench.row import LONG, eager, fastest, fractions, in_roundings, is_small, largest, median, ratio, spread


def layer_table(rows: list[dict], short: bool = False) -> str:
    """The layers' times beside the read ceilings and the peers: a part for each dtype, device, routing and setup.

    short: without the tables of vLLM's batch-invariant mode and of eager calls.
    """
    parts = [_section(part, short) for part in sections(rows, "dtype", "device", "routing")]
    return "\n\n".join([*parts, *routing_tables(rows)])


def _section(rows: list[dict], short_report: bool) -> str:
    first, shapes = rows[0], grouped(rows, "shape")
    short = [row for row in rows if row["tokens"] < LONG]
    long = [row for row in rows if row["tokens"] >= LONG]
    headline = [row for row in short if row["shape"] == first["shape"]]
    if len(shapes) == 1:
        parts = [f"One layer, {_sizes(first)}, {measured(rows)}."]
    else:
        parts = [f"{len(shapes)} layers, {measured(rows)}."]
        if short:
            mark = ", * of two reads where a call reads less than 100 MB" if any(map(is_small, short)) else ""
            parts += [f"Fraction of the read ceiling{mark}:", by_tokens(short, _fraction)]
        if headline:
            parts.append(f"{_sizes(first)}:")
    if headline:
        parts.append(_times(headline))
    if len(shapes) > 1:
        for name, title in (("vllm", "vLLM's time"), (INVARIANT_NAME, "The time of vLLM, batch-invariant,")):
            left_out = short_report and name == INVARIANT_NAME
            if not left_out and any(name in row["microseconds"] for row in short):
                parts += [f"{title} divided by ours:", by_tokens(short, lambda row, name=name: ratio(row, name))]
    if any("vllm_config" in row for row in rows):
        parts.append(_tables_of_vllm(rows))
    if long:
        peers = [name for name in ("vllm", "transformers grouped_mm") if any(name in row["tflops"] for row in long)]
        named = " / ".join(["ours", *(_shown(name) for name in peers)])
        parts += [f"Useful TFLOP/s, {named}:", by_tokens(long, lambda row: _speeds(row, ["warpdecode", *peers]))]
    if not short_report:
        parts += _eager(rows)
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


def _fraction(row: dict) -> str:
    plain, *two_reads = fractions(row)
    return plain + "".join(f" ({found})" for found in two_reads)


def _speeds(row: dict, names: list[str]) -> str:
    return " / ".join(f"{row['tflops'][name]:.0f}" if name in row["tflops"] else "-" for name in names)


def _times(rows: list[dict]) -> str:
    """One shape: times of the ceiling, of ours and of the peers, T by T."""
    some = {name for row in rows for name in row["peers"]}
    heads = ["T", "read ceiling, us (p10 to p90)", "warpdecode, us (p10 to p90)", "of the ceiling"]
    heads += ["vLLM, us", "ratio"] if "vllm" in some else []
    heads += ["vLLM batch-invariant, ratio"] if INVARIANT_NAME in some else []
    transformers = any(name.split()[0] == "transformers" for name in some)
    heads += ["transformers' fastest, us", "ratio"] if transformers else []
    lines = []
    for row in rows:
        times = row["microseconds"]
        two = f" ({row['of_two_reads']:.2f} of two reads)" if is_small(row) else ""
        cells = [
            str(row["tokens"]), spread(times["read ceiling"]), spread(times["warpdecode"]),
            f"{row['of_ceiling']:.2f}{two}",
        ]  # fmt: skip
        if "vllm" in some:
            cells += [f"{median(row, 'vllm'):.1f}" if "vllm" in row["peers"] else "-", ratio(row, "vllm")]
        if INVARIANT_NAME in some:
            cells.append(ratio(row, INVARIANT_NAME))
        if transformers:
            peer = fastest(row, "transformers")
            cells += [f"{median(row, peer):.0f} ({peer.split()[-1]})" if peer else "-", ratio(row, peer)]
        lines.append(cells)
    return markdown(heads, lines)


def _eager(rows: list[dict]) -> list[str]:
    """Calls from Python beside replays of the same calls: what is between them is the host's. On a CPU they are one."""
    rows = [row for row in rows if "eager_microseconds" in row and row["device"] == "cuda"]
    if not rows:
        return []
    title = (
        "Calls from Python, us (p10 to p90), and behind the slash replayed (transformers eager: called, no graph can "
        "hold it); what a call takes longer is the host's:"
    )
    return [title, by_tokens(rows, _eager_cell, "path", _eager_names)]


def _eager_names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["eager_microseconds"]))


def _eager_cell(row: dict, name: str) -> str:
    found = eager(row, name)
    return f"{spread(found)} / {median(row, name):.1f}" if found else "-"


def _errors(rows: list[dict]) -> str:
    """The largest errors of the rows, ours and each package's; nan where one is no number."""
    found = [f"ours at most {largest([in_roundings(row, row['error']) for row in rows]):.3f}"]
    for package, whose in (("transformers", "transformers' paths"), ("vllm", "vLLM's")):
        errors = [
            in_roundings(row, error)
            for row in rows
            for name, error in row["peer_errors"].items()
            if name.split()[0] == package
        ]
        if errors:
            found.append(f"{whose} up to {largest(errors):.1f}")
    text = f"Error against FP64, in units of the output's own rounding: {', '.join(found)}."
    alone = [row["same_bits_alone"] for row in rows if "same_bits_alone" in row and row["tokens"] > 1]
    return text + (f" A token alone has its batch's bits in {sum(alone)} of {len(alone)} rows." if alone else "")


def _table(row: dict) -> str:
    """Which table a row is for."""
    return "models" if "model" in row else "layouts" if row.get("layouts") else "layers"


def _order(rows: list[dict]) -> int:
    """Decode steps of layers, of models, long calls, other layouts, the CPU: the order of the report."""
    if rows[0]["device"] == "cpu":
        return 4
    kind = _table(rows[0])
    if kind == "layers":
        return 2 if all(row["tokens"] >= LONG for row in rows) else 0
    return {"models": 1, "layouts": 3}[kind]


def report(folder: Path, short: bool = False) -> str:
    """The tables of all result files in a folder, or of one file. short: README's, without vLLM batch-invariant, eager
    calls and layouts.

    Raises ValueError where there is no row, for a line that is none, and for rows that have the same place in a table.
    """
    tables = {"models": generate_table, "layers": lambda rows: layer_table(rows, short), "layouts": layouts_table}
    found = []
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.jsonl")):
        # Tables of one file, whatever was appended to it: rows of several files are of several runs.
        for (kind, _), rows in grouped(rows_of(path), _table, "device").items():
            try:
                found.append((_order(rows), kind, tables[kind](rows)))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if not found:  # a run that was interrupted before its first row leaves an empty file
        raise ValueError(f"{folder} has no {'' if folder.is_file() else '.jsonl file with '}rows of the benchmark")
    found.sort(key=lambda part: part[0])
    return "\n\n".join(text for _, kind, text in found if not (short and kind == "layouts"))


@command("warpdecode.bench.report")
def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m warpdecode.bench.report", description="Tables of result files.")
    parser.add_argument("folder", type=Path, help="where the .jsonl files lie, or one of them")
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
