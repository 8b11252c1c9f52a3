"""`warpdecode bench`: one layer's time beside the read ceiling of the same bytes and beside transformers' own paths.

Everything in a row is measured in one run, on the same weights and the same fresh random routings. Weights are cold:
calls rotate over copies of the layer that together exceed the last-level cache four times.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import datetime, timezone

from warpdecode.shapes import SHAPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--shapes", default="qwen3-30b-a3b", help=f"all, or names of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="1,4,16", help="comma-separated numbers of tokens T (default %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated: bfloat16, float16, float32 (CPU only)")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where it is usable")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"], help="how experts are drawn")
    parser.add_argument("--kernels", default="", help="rows of `warpdecode info` to force and time, too")
    parser.add_argument("--repeats", type=int, default=20, help="measurements per figure (default %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' paths out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=None, help="append the rows to this file as JSON lines")


def environment(device: str) -> dict:
    """What a figure depends on beside the code: versions, machine, date."""
    import torch

    import warpdecode

    found = {
        "warpdecode": warpdecode.version(),
        "numerics": warpdecode.numerics_id(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "threads": warpdecode.get_num_threads(),
    }
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except ImportError:
        pass
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver_cuda"] = warpdecode.cuda_devices()[0].driver_cuda
    else:
        found["processor"] = platform.processor() or platform.machine()
        found["kernel"] = next(k.name for k in warpdecode.kernels() if k.device == "cpu" and k.usable)
    return found


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; prints a table, appends JSON lines to args.output. Returns the exit code."""
    import warpdecode

    try:
        import torch
    except ImportError:
        print("warpdecode bench: needs torch; pip install 'warpdecode[hf]'", file=sys.stderr)
        return 1
    from warpdecode.bench.measure import measure

    device = args.device or ("cuda" if warpdecode.cuda_usable()[0] and torch.cuda.is_available() else "cpu")
    names = list(SHAPES) if args.shapes == "all" else args.shapes.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        print(f"warpdecode bench: --shapes was {', '.join(unknown)}, expected {', '.join(SHAPES)}", file=sys.stderr)
        return 2
    kernels = [name for name in args.kernels.split(",") if name]
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    columns = (
        "T",
        "distinct MB",
        "read ceiling",
        "ours",
        "of ceiling",
        *kernels,
        "fastest peer",
        "ratio",
        "error/floor",
    )
    for name in names:
        for dtype in args.dtypes.split(","):
            print(f"\n{SHAPES[name]}, {dtype}, {args.routing} routing, {device}; medians in microseconds")
            print(" ".join(f"{column:>13}" for column in columns))
            rows = measure(
                SHAPES[name], dtype, [int(t) for t in args.tokens.split(",")], device, args.routing, kernels,
                repeats=args.repeats, peers=not args.no_peers, seed=args.seed,
            )  # fmt: skip
            for row in rows:
                print(_line(row, kernels), flush=True)
                if args.output:
                    with open(args.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, "environment": found}) + "\n")
    return 0


def _line(row: dict, kernels: list[str]) -> str:
    times = row["microseconds"]
    peers = {name: times[name]["median"] for name in row["peers"]}
    fastest = min(peers, key=peers.get) if peers else None
    ours, ceiling = times["warpdecode"]["median"], times["read ceiling"]["median"]
    cells = [
        str(row["tokens"]),
        f"{row['distinct_bytes'] / 1e6:.1f}",
        f"{ceiling:.1f}",
        f"{ours:.1f}",
        f"{ceiling / ours:.3f}",
        *(f"{times[name]['median']:.1f}" for name in kernels),
        f"{fastest} {peers[fastest]:.0f}" if fastest else "-",
        f"{peers[fastest] / ours:.2f}" if fastest else "-",
        f"{row['error'] / row['rounding_floor']:.3f}",
    ]
    return " ".join(f"{cell:>13}" for cell in cells)
