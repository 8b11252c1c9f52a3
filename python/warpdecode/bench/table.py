"""The table that `warpdecode bench` prints while it measures: one line a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from warpdecode.bench.layouts import label

Column = tuple[str, Callable[[dict], str]]

# Below this many distinct bytes a single read is no ceiling of two kernels: their two starts count.
SMALL_BYTES = 100_000_000
LEGEND = (
    "ours: p10 to p90 in brackets; of ceiling: read ceiling / ours, and * two reads / ours where less than 100 MB are "
    "read;\nratio: the peer's time / ours, batch-invariant in its own process; of a layout: ours / the layout's; "
    "error/floor: ours against FP64,\nin units of the output's own rounding."
)


def columns(kernels: list[str], *, parts: bool, peers: list[str], layouts: Sequence[str] = ()) -> list[Column]:
    """The table's columns: name, and what to print of a row."""
    found: list[Column] = [
        ("T", lambda row: str(row["tokens"])),
        ("dist. MB", lambda row: f"{row['distinct_bytes'] / 1e6:.1f}"),
        ("ceiling", lambda row: _time(row, "read ceiling")),
        ("two reads", lambda row: _time(row, "two reads")),
        ("ours", lambda row: _time(row, "warpdecode")),
        ("(p10-p90)", _spread),
        ("of ceiling", _fraction),
    ]
    names = (["gate_up", "down"] if parts else []) + kernels
    found += [(name, lambda row, name=name: _time(row, name)) for name in names]
    for name in layouts:
        found += [
            (name, lambda row, name=name: _time(row, label(name))),
            ("ratio", lambda row, name=name: _layout_ratio(row, name)),
        ]
    if "vllm" in peers:
        found += [("vllm", lambda row: _time(row, "vllm")), ("ratio", lambda row: _ratio(row, "vllm"))]
    if "vllm-invariant" in peers:
        found.append(("inv. ratio", lambda row: _ratio(row, "vllm batch-invariant")))
    if "transformers" in peers:
        found += [("transformers", _fastest), ("ratio", lambda row: _ratio(row, fastest(row, "transformers")))]
    return [
        *found,
        ("TFLOP/s", lambda row: f"{row['tflops']['warpdecode']:.3g}"),
        ("error/floor", lambda row: f"{row['error'] / row['rounding_floor']:.3f}"),
    ]


def heading(found: list[Column]) -> str:
    """The table's first line."""
    return " ".join(f"{name:>{_width(name)}}" for name, _ in found)


def line(found: list[Column], row: dict) -> str:
    """A row's line."""
    return " ".join(f"{cell(row):>{_width(name)}}" for name, cell in found)


def fastest(row: dict, package: str) -> str | None:
    """The fastest of a package's paths in a row."""
    names = [name for name in row["peers"] if name.split()[0] == package]
    return min(names, key=lambda name: row["microseconds"][name]["median"], default=None)


def _width(name: str) -> int:
    return {"T": 6, "(p10-p90)": 15, "of ceiling": 12, "transformers": 18, "ratio": 6}.get(name, max(9, len(name)))


def _time(row: dict, name: str) -> str:
    time = row["microseconds"].get(name)
    return f"{time['median']:.1f}" if time else "-"


def _spread(row: dict) -> str:
    time = row["microseconds"]["warpdecode"]
    return f"({time['p10']:.1f}-{time['p90']:.1f})"


def _fraction(row: dict) -> str:
    two = f" {row['of_two_reads']:.2f}*" if row["distinct_bytes"] < SMALL_BYTES else ""
    return f"{row['of_ceiling']:.2f}{two}"


def _ratio(row: dict, name: str | None) -> str:
    return f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-"


def _layout_ratio(row: dict, name: str) -> str:
    return f"{row['layout_ratios'][name]:.2f}" if name in row["layouts"] else "-"


def _fastest(row: dict) -> str:
    name = fastest(row, "transformers")
    return f"{name.split()[-1]} {row['microseconds'][name]['median']:.0f}" if name else "-"
