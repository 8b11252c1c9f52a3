"""The kernels of one decode step of `generate()`: where its time on the GPU goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

LEAST, _MOST = 4, 12  # new tokens of the longer of two generations, which differ by half of its steps
_LISTED = 24


def _times(call: Callable) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kernel, by its short name."""
    from warpdecode.bench.kernels_seen import recorded, shortened  # torch, which the command's --help does without

    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in recorded(call):
        count, time = found[shortened(event.name)]
        found[shortened(event.name)] = count + 1, time + event.time_range.elapsed_us()
    return found


def kernels_of_a_step(run: Callable[[int], object], new_tokens: int) -> dict:
    """run(n) generates n tokens, at most new_tokens, which are at least LEAST. Milliseconds that a step keeps the GPU
    busy, its launches, and its longest kernels: name, launches and microseconds a step. The prompt's pass and the first
    token are in both generations alike, and fall out. The profiler adds to the times between kernels: those are not
    told."""
    many = min(_MOST, new_tokens)
    few = many // 2
    short, long = _times(lambda: run(few)), _times(lambda: run(many))
    steps, rows = many - few, []
    for name, (count, time) in long.items():
        fewer, shorter = short.get(name, (0, 0.0))
        if count > fewer:
            rows.append({"name": name, "launches": (count - fewer) / steps, "microseconds": (time - shorter) / steps})
    rows.sort(key=lambda row: -row["microseconds"])
    return {
        "busy_ms": 1e-3 * sum(row["microseconds"] for row in rows),
        "launches": sum(row["launches"] for row in rows),
        "longest": rows[:_LISTED],
    }
