"""The table that `warpdecode bench` prints while it measures: one line a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from warpdecode.bench.child import INVARIANT_NAME
from warpdecode.bench.layouts import label
from warpdecode.bench.row import eager as eager_time
from warpdecode.bench.row import fastest, fractions, in_roundings, median, ratio

Column = tuple[str, Callable[[dict], str]]

LEGEND = (
    "ours: p10 to p90 in brackets; of ceiling: read ceiling / ours, and * two reads / ours where less than 100 MB are "
    "read;\nratio: the peer's time / ours, batch-invariant in its own process; of a layout: ours / the layout's; "
    "eager: ours,\ncalled from Python; error/floor: ours against FP64, in units of the output's own rounding."
)


def columns(
    kernels: list[str], *, parts: bool, peers: list[str], layouts: Sequence[str] = (), eager: bool = False
) -> list[Column]:
    """The table's columns: name, and what to print of a row."""
    found: list[Column] = [
        ("T", lambda row: str(row["tokens"])),
        ("dist. MB", lambda row: f"{row['distinct_bytes'] / 1e6:.1f}"),
        ("ceiling", lambda row: _time(row, "read ceiling")),
        ("two reads", lambda row: _time(row, "two reads")),
        ("ours", lambda row: _time(row, "warpdecode")),
        ("(p10-p90)", lambda row: _spread(row["microseconds"]["warpdecode"])),
        ("of ceiling", lambda row: " ".join(fractions(row))),
    ]
    if eager:
        found += [
            ("eager", lambda row: f"{eager_time(row, 'warpdecode')['median']:.1f}"),
            ("(p10-p90)", lambda row: _spread(eager_time(row, "warpdecode"))),
        ]
    names = (["gate_up", "down"] if parts else []) + kernels
    found += [(name, lambda row, name=name: _time(row, name)) for name in names]
    for name in layouts:
        found += [
            (name, lambda row, name=name: _time(row, label(name))),
            ("ratio", lambda row, name=name: _layout_ratio(row, name)),
        ]
    if "vllm" in peers:
        found += [("vllm", lambda row: _time(row, "vllm")), ("ratio", lambda row: ratio(row, "vllm"))]
    if "vllm-invariant" in peers:
        found.append(("inv. ratio", lambda row: ratio(row, INVARIANT_NAME)))
    if "transformers" in peers:
        found += [("transformers", _fastest), ("ratio", lambda row: ratio(row, fastest(row, "transformers")))]
    return [
        *found,
        ("TFLOP/s", lambda row: f"{row['tflops']['warpdecode']:.3g}"),
        ("error/floor", lambda row: f"{in_roundings(row, row['error']):.3f}"),
    ]


def heading(found: list[Column]) -> str:
    """The table's first line."""
    return " ".join(f"{name:>{_width(name)}}" for name, _ in found)


def line(found: list[Column], row: dict) -> str:
    """A row's line."""
    return " ".join(f"{cell(row):>{_width(name)}}" for name, cell in found)


def _width(name: str) -> int:
    return {"T": 6, "(p10-p90)": 15, "of ceiling": 12, "transformers": 18, "ratio": 6}.get(name, max(9, len(name)))


def _time(row: dict, name: str) -> str:
    return f"{median(row, name):.1f}" if name in row["microseconds"] else "-"


def _spread(time: dict) -> str:
    return f"({time['p10']:.1f}-{time['p90']:.1f})"


def _layout_ratio(row: dict, name: str) -> str:
    return f"{row['layout_ratios'][name]:.2f}" if name in row["layouts"] else "-"


def _fastest(row: dict) -> str:
    name = fastest(row, "transformers")
    return f"{name.split()[-1]} {median(row, name):.0f}" if name else "-"
