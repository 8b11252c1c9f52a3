"""What a row of the layer benchmark says, read in one way by all tables and plots. Needs no torch."""

from __future__ import annotations

import math

LONG = 512  # tokens from which a row is of a prompt, not of decode steps: its figure is TFLOP/s
# Below this many distinct bytes a single read is no ceiling of two kernels: their two starts count.
SMALL_BYTES = 100_000_000


def is_small(row: dict) -> bool:
    """Whether the two reads are the ceiling, too."""
    return row["distinct_bytes"] < SMALL_BYTES


def fractions(row: dict, layout: str | None = None) -> list[str]:
    """What ours, or ours in another layout, reaches of the read ceiling, and with a star of the two reads of a small
    row."""
    speed = 1 if layout is None else row["layout_ratios"][layout]
    found = [f"{row['of_ceiling'] * speed:.2f}"]
    return [*found, f"{row['of_two_reads'] * speed:.2f}*"] if is_small(row) else found


def median(row: dict, name: str) -> float:
    """Microseconds of a candidate."""
    return row["microseconds"][name]["median"]


def eager(row: dict, name: str) -> dict | None:
    """Summary of a candidate's eager calls; of an early row the median alone."""
    found = row.get("eager_microseconds", {}).get(name)
    return {"median": found} if isinstance(found, (int, float)) else found


def spread(time: dict) -> str:
    """A median with what is known of its spread."""
    more = f" ({time['p10']:.1f} to {time['p90']:.1f})" if "p10" in time else ""
    return f"{time['median']:.1f}{more}"


def ratio(row: dict, name: str | None) -> str:
    """A peer's time by ours, as it was taken: side by side where the peer ran in a process of its own."""
    return f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-"


def fastest(row: dict, package: str) -> str | None:
    """The fastest of a package's paths in a row."""
    names = [name for name in row["peers"] if name.split()[0] == package]
    return min(names, key=lambda name: median(row, name), default=None)


def number(value: float | None) -> float:
    """What is no number has null in a row: JSON has no nan."""
    return math.nan if value is None else value


def in_roundings(row: dict, error: float | None) -> float:
    """An error in units of the output's own rounding."""
    return number(error) / number(row["rounding_floor"])


def largest(numbers: list[float]) -> float:
    """Their largest, and nan where one is nan: max() passes it over."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)
