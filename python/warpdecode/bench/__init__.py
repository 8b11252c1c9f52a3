"""`warpdecode bench`: a layer's time beside the read ceiling of the same bytes, transformers' paths and vLLM's kernel.

Everything in a row is measured in one run, on the same weights and the same fresh random routings, on CUDA as replays
of a graph. Weights are cold: calls rotate over copies of the layer that together exceed the last-level cache four
times. vLLM's batch-invariant mode needs a process of its own; that one takes its ratio beside its own `warpdecode`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys

from warpdecode.bench import layouts, options
from warpdecode.shapes import SHAPES, named_shapes

ROUTINGS = ("uniform", "zipf", "same")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.epilog = "Decode steps of generate() on whole models: python -m warpdecode.bench.end_to_end --help."
    parser.add_argument(
        "--shapes", default="qwen3-30b-a3b",
        help=f"comma-separated: nine, all, random:N (drawn with --seed), or names of {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument("--tokens", default="1,4,16", help="comma-separated numbers of tokens T (default %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated: bfloat16, float16, float32 (CPU only)")
    parser.add_argument(
        "--device", default=None, choices=options.DEVICES,
        help="default: cuda where it is usable; of several GPUs the first that CUDA_VISIBLE_DEVICES leaves",
    )  # fmt: skip
    parser.add_argument(
        "--routing", default="uniform",
        help="comma-separated: how experts are drawn: uniform, zipf, or same (every token of a call has the same ones)",
    )  # fmt: skip
    parser.add_argument("--kernels", default="", help="rows of `warpdecode info` to force and time, too")
    parser.add_argument("--repeats", type=int, default=None, help="measurements per figure (default 11, CPU 20)")
    parser.add_argument(
        "--peers", default=None,
        help="comma-separated: transformers, vllm, vllm-invariant; or none (default: all that can be imported)",
    )  # fmt: skip
    parser.add_argument(
        "--layouts", default="",
        help="other layouts of the same bytes, timed beside the standard one: all, or comma-separated "
        + "; ".join(f"{name} ({what})" for name, what in layouts.NAMES.items()),
    )  # fmt: skip
    parser.add_argument("--no-parts", action="store_true", help="leave the two kernels alone out")
    parser.add_argument("--no-profile", action="store_true", help="do not record which CUDA kernels ran")
    parser.add_argument("--eager", action="store_true", help="time eager calls and transformers' eager path, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=None, help="recorded in the rows (default: the source tree's own)")
    parser.add_argument("--output", default=None, help="append the rows to this file as JSON lines")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; prints a table, appends JSON lines to args.output. Returns the exit code: 0 all was measured,
    1 something could not be, 2 wrong usage."""
    import warpdecode

    try:
        import torch  # noqa: F401
    except ImportError:
        print("warpdecode bench: needs torch; pip install 'warpdecode[hf]'", file=sys.stderr)
        return 1
    from warpdecode.bench import machine, peers, table, timers
    from warpdecode.bench.runner import Runner

    with contextlib.ExitStack() as stack:
        try:
            device = options.checked("--device", options.device, args.device)
            shapes = options.checked("--shapes", named_shapes, args.shapes, args.seed)
            tokens = options.checked("--tokens", options.numbers, args.tokens)
            dtypes = ["bfloat16", "float16", *(["float32"] if device == "cpu" else [])]
            dtypes = options.checked("--dtypes", options.names, args.dtypes, dtypes)
            usable = [kernel.name for kernel in warpdecode.kernels() if kernel.device == device and kernel.usable]
            kernels = options.checked("--kernels", options.names, args.kernels, usable) if args.kernels else []
            options.checked("--repeats", options.at_least, args.repeats, 1)
            routings = options.checked("--routing", options.names, args.routing, ROUTINGS)
            peer_names, missing = options.checked("--peers", peers.chosen, args.peers, device)
            layout_names = options.checked("--layouts", layouts.chosen, args.layouts)
            append = options.checked("--output", stack.enter_context, options.appended(args.output))
        except ValueError as error:
            print(f"warpdecode bench: {error}", file=sys.stderr)
            return 2
        with timers.torch_threads() if device == "cpu" else contextlib.nullcontext():  # as when calls are timed
            found = machine.environment(device, args.commit, args)
        print(", ".join(f"{key} {value}" for key, value in found.items() if key != "options"))
        without = "; ".join(f"{name}: {why}" for name, why in missing.items())
        print(f"peers: {', '.join(peer_names) or 'none'}{f' ({without})' if without else ''}")
        columns = table.columns(
            kernels, parts=not args.no_parts, peers=peer_names, layouts=layout_names, eager=args.eager
        )
        asked = {} if args.peers is None else missing
        runner = stack.enter_context(Runner(device, kernels, peer_names, asked, layout_names, args))
        for shape, dtype, routing in itertools.product(shapes, dtypes, routings):
            print(f"\n{shape}, {dtype}, {routing} routing, {device}; medians in microseconds")
            print(table.heading(columns), flush=True)
            for row in runner.rows(shape, dtype, routing, tokens):
                print(table.line(columns, row), flush=True)
                append({**row, "environment": found})
    print(f"\n{table.LEGEND}")
    return 0 if runner.complete else 1
