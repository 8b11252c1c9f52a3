"""The table of other layouts beside the standard one."""

from __future__ import annotations

from warpdecode.bench.report_parts import by_tokens, measured, sections
from warpdecode.bench.row import fractions, is_small

_STANDARD = "standard"


def layouts_table(rows: list[dict]) -> str:
    """Each layout of each layer beside the standard one of the same bytes, T by T."""
    return "\n\n".join(_section(part) for part in sections(rows, "dtype", "device", "routing"))


def _section(rows: list[dict]) -> str:
    mark = ", * of two reads where a call reads less than 100 MB" if any(map(is_small, rows)) else ""
    return (
        f"Other layouts of the same bytes, {measured(rows)}. The standard layout's fraction of the read ceiling{mark}; "
        "the standard layout's time divided by the other's, and in brackets the other's fraction:\n\n"
        + by_tokens(rows, _cell, "layout", _names)
    )


def _names(rows: list[dict]) -> list[str]:
    return [_STANDARD, *dict.fromkeys(name for row in rows for name in row["layouts"])]


def _cell(row: dict, layout: str) -> str:
    if layout == _STANDARD:
        return ", ".join(fractions(row))
    if layout not in row["layouts"]:
        return ""
    return f"{row['layout_ratios'][layout]:.2f} ({', '.join(fractions(row, layout))})"
