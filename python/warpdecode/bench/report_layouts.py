"""The table of other layouts beside the standard one."""

from __future__ import annotations

from warpdecode.bench.layouts import label
from warpdecode.bench.report_parts import conditions, grouped, markdown
from warpdecode.bench.table import SMALL_BYTES


def layouts_table(rows: list[dict]) -> str:
    """Each layout of each layer beside the standard one of the same bytes, T by T."""
    return "\n\n".join(_section(part) for part in grouped(rows, "dtype", "device", "routing").values())


def _section(rows: list[dict]) -> str:
    first, tokens = rows[0], sorted({row["tokens"] for row in rows})
    replay = "CUDA graph replays, " if first["device"] == "cuda" else ""
    lines = []
    for (shape,), part in grouped(rows, "shape").items():
        by_tokens = {row["tokens"]: row for row in part}
        names = list(dict.fromkeys(name for row in part for name in row["layouts"]))
        for name in (None, *names):
            lines.append([shape, name or "standard", *(_cell(by_tokens.get(count), name) for count in tokens)])
    heads = ["shape", "layout", *(f"T {count}" for count in tokens)]
    mark = ", * of two reads where a call reads less than 100 MB" if any(map(_is_small, rows)) else ""
    return (
        f"Other layouts of the same bytes, {first['dtype']}, {replay}cold weights, {first['routing']} routing, "
        f"medians; {conditions(first)}. The standard layout's fraction of the read ceiling{mark}; the standard "
        "layout's time divided by the other's, and in brackets the other's fraction:\n\n"
        + markdown(heads, lines, first=":--")
    )


def _is_small(row: dict) -> bool:
    return row["distinct_bytes"] < SMALL_BYTES


def _cell(row: dict | None, layout: str | None) -> str:
    if row is None or (layout is not None and layout not in row["layouts"]):
        return ""
    name = "warpdecode" if layout is None else label(layout)
    ceiling = "two reads" if _is_small(row) else "read ceiling"
    fraction = row["microseconds"][ceiling]["median"] / row["microseconds"][name]["median"]
    fraction = f"{fraction:.2f}{'*' if _is_small(row) else ''}"
    return fraction if layout is None else f"{row['layout_ratios'][layout]:.2f} ({fraction})"
