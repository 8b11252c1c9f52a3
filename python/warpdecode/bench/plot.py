"""Plots of a result file: `python -m warpdecode.bench.plot RESULTS.jsonl OUT.png`.

For each shape the times of all candidates over T, and the fraction of the read ceiling over T.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warpdecode.bench.command import command
from warpdecode.bench.report_parts import conditions, rows_of, sections
from warpdecode.bench.row import is_small, median

_CEILINGS, _PARTS = ("read ceiling", "two reads"), ("gate_up", "down")  # no paths of the whole layer: no fractions
_HOLLOW = {"marker": "o", "markersize": 6, "markerfacecolor": "none", "linestyle": ""}


def plot(rows: list[dict]):
    """A matplotlib figure of two plots for each shape, dtype, device, routing and setup among the rows.

    Raises ValueError where two rows have the same number of tokens in a plot.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is looked for

    parts = sections(rows, "shape", "dtype", "device", "routing", lambda row: bool(row.get("layouts")))
    figure = Figure(figsize=(15, 4 * len(parts)), layout="constrained")
    for part, (times, fractions) in zip(parts, figure.subplots(len(parts), 2, squeeze=False), strict=True):
        part.sort(key=lambda row: row["tokens"])
        styles, first = _styles(part), part[0]
        for name, style in styles.items():
            some = [row for row in part if name in row["microseconds"]]
            times.plot([row["tokens"] for row in some], [median(row, name) for row in some], label=name, **style)
        times.legend(fontsize="small")
        _draw_fractions(fractions, part, styles)
        times.set(ylabel="microseconds a layer", yscale="log")
        times.set_title(
            f"{first['shape']}, {first['dtype']}, {first['routing']} routing\n{conditions(part)}", fontsize=7
        )
        fractions.set_title(f"{first['shape']}: fraction of the read ceiling", fontsize=7)
        ticks = [row["tokens"] for row in part]
        for axes in (times, fractions):
            axes.set(xscale="log", xlabel="tokens T")
            axes.set_xticks(ticks, [str(tokens) for tokens in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    return figure


def _draw_fractions(axes, rows: list[dict], styles: dict[str, dict]) -> None:
    """Fractions of the read ceiling, and as hollow markers those of two reads, which are the ceiling of small calls."""
    axes.axhline(1.0, color="grey", linewidth=0.8)
    most = 1.05
    for name, style in styles.items():
        if name in (*_CEILINGS, *_PARTS):
            continue
        some = [row for row in rows if name in row["microseconds"]]
        found = [_fraction(row, name, "read ceiling") for row in some]
        axes.plot([row["tokens"] for row in some], found, label=name, **style)
        few = [row for row in some if is_small(row)]
        hollow = [_fraction(row, name, "two reads") for row in few]
        axes.plot([row["tokens"] for row in few], hollow, color=style["color"], **_HOLLOW)
        most = max([most, *(1.02 * number for number in found + hollow)])
    if any(map(is_small, rows)):
        axes.plot([], [], color="grey", label="of two reads (less than 100 MB)", **_HOLLOW)
    axes.set_ylim(0, most)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _fraction(row: dict, name: str, ceiling: str) -> float:
    """By the ceiling of the process that the candidate was timed in."""
    return row.get("apart", {}).get(name, row)["microseconds"][ceiling]["median"] / median(row, name)


def _styles(rows: list[dict]) -> dict[str, dict]:
    """Every candidate of the rows with its line and colour: ours strong, ceilings dashed, parts dotted."""
    from matplotlib import colormaps

    styles, colors = {}, colormaps["tab20"].colors
    for position, name in enumerate(dict.fromkeys(name for row in rows for name in row["microseconds"])):
        style = {"color": colors[position % len(colors)], "marker": "o", "markersize": 3.5, "linewidth": 1.3}
        if name == "warpdecode":
            style.update(color="black", linewidth=2.2)
        elif name in _CEILINGS:
            style.update(linestyle="--", marker="")
        elif name in _PARTS:
            style.update(linestyle=":", marker="")
        styles[name] = style
    return styles


@command("warpdecode.bench.plot")
def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m warpdecode.bench.plot", description="Plots of a result file: times and fractions over T."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="what `warpdecode bench --output` wrote")
    parser.add_argument("picture", metavar="OUT.png", help="where to draw; the suffix is the format")
    args = parser.parse_args(argv)
    try:
        found = rows_of(args.results)
        rows = [row for row in found if "microseconds" in row]
        if len(rows) < len(found):
            print(f"rows of generate() that are not drawn: {len(found) - len(rows)}", file=sys.stderr)
        if not rows:
            raise ValueError(f"{args.results} has no rows of a layer")
        plot(rows).savefig(args.picture, dpi=110)
    except (OSError, ValueError) as error:
        print(f"warpdecode.bench.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
