"""Plots of a result file: `python -m warpdecode.bench.plot RESULTS.jsonl OUT.png`.

For each shape the times of all candidates over T, and the fraction of the read ceiling over T.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from warpdecode.bench.report_parts import grouped, rows_of

_LEFT_OUT = ("read ceiling", "two reads", "gate_up", "down")  # of the fractions: not paths of the whole layer


def plot(rows: list[dict]):
    """A matplotlib figure of two plots for each shape, dtype, device and routing among the rows."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for

    groups = grouped(rows, "shape", "dtype", "device", "routing")
    figure = Figure(figsize=(13, 4 * len(groups)), layout="constrained")
    places = figure.subplots(len(groups), 2, squeeze=False)
    for (key, part), (times, fractions) in zip(groups.items(), places, strict=True):
        part.sort(key=lambda row: row["tokens"])
        shape, dtype, device, routing = key
        for name, style in _styles(part).items():
            points = [
                (row["tokens"], row["microseconds"][name]["median"], row["microseconds"]["read ceiling"]["median"])
                for row in part
                if name in row["microseconds"]
            ]
            x = [tokens for tokens, _, _ in points]
            times.plot(x, [time for _, time, _ in points], label=name, **style)
            if name not in _LEFT_OUT:
                fractions.plot(x, [ceiling / time for _, time, ceiling in points], label=name, **style)
        place = part[0]["environment"].get("gpu", device)
        times.set(title=f"{shape}, {dtype}, {routing} routing, {place}", ylabel="microseconds a layer", yscale="log")
        fractions.set(title=f"{shape}: fraction of the read ceiling", ylim=(0, None))
        fractions.axhline(1.0, color="grey", linewidth=0.8)
        ticks = sorted({row["tokens"] for row in part})
        for axes in (times, fractions):
            axes.set(xscale="log", xlabel="tokens T")
            axes.set_xticks(ticks, [str(tokens) for tokens in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        times.legend(fontsize="small")
    return figure


def _styles(rows: list[dict]) -> dict[str, dict]:
    """Every candidate of the rows with its line: ours strong, ceilings dashed, parts dotted."""
    styles: dict[str, dict] = {}
    for name in dict.fromkeys(name for row in rows for name in row["microseconds"]):
        style = {"marker": "o", "markersize": 3.5, "linewidth": 1.3}
        if name == "warpdecode":
            style.update(color="black", linewidth=2.2)
        elif name in ("read ceiling", "two reads"):
            style.update(linestyle="--", marker="")
        elif name in ("gate_up", "down"):
            style.update(linestyle=":", marker="")
        styles[name] = style
    return styles


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m warpdecode.bench.plot", description="Plots of a result file: times and fractions over T."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="what `warpdecode bench --output` wrote")
    parser.add_argument("picture", metavar="OUT.png", help="where to draw; the suffix is the format")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("warpdecode.bench.plot: needs matplotlib; pip install 'warpdecode[notebook]'", file=sys.stderr)
        return 1
    try:
        rows = [row for row in rows_of(args.results) if "microseconds" in row]
        if not rows:
            raise ValueError(f"{args.results} has no rows of a layer")
        plot(rows).savefig(args.picture, dpi=110)
    except (OSError, ValueError) as error:
        print(f"warpdecode.bench.plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
