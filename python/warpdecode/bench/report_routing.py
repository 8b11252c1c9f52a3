"""Skewed routings beside even ones: they read less, and should take no longer."""

from __future__ import annotations

from warpdecode.bench.report_parts import by_tokens, conditions, grouped, setup
from warpdecode.bench.row import median

EVEN = "uniform"


def routing_tables(rows: list[dict]) -> list[str]:
    """The time of each other routing by that of an even one, where both were measured of a shape and T in one file."""
    even = {_place(row): row for row in rows if row["routing"] == EVEN}
    skewed = [row for row in rows if row["routing"] != EVEN and _place(row) in even]

    def cell(row: dict) -> str:
        return f"{median(row, 'warpdecode') / median(even[_place(row)], 'warpdecode'):.2f}"

    return [
        f"{dtype}, our time with {routing} routing divided by that with {EVEN} routing; {conditions(part)}:\n\n"
        + by_tokens(part, cell)
        for (dtype, _, routing, _), part in grouped(skewed, "dtype", "device", "routing", setup).items()
    ]


def _place(row: dict) -> tuple:
    return row["dtype"], row["device"], row["shape"], row["tokens"], setup(row)
