"""Decode steps of `generate()` on models of real sizes with random weights: transformers' experts, ours, and null ones.

    python -m warpdecode.bench.end_to_end --models qwen3-30b-a3b --modes static --output results.jsonl

Null experts are the identity, weighted and added as the router says, and read no weights: no kernel can be faster.
Variants run in turn in one process, on the same weights. A row is the time of a decode step, whose quotient with the
batch is tokens per second; the speed of the whole call, prompt and first token included, is beside it.

Modes: `static` is generate(cache_implementation="static"), whose step transformers compiles on a GPU, into CUDA graphs;
where it compiled nothing, as on the CPU, that is said. `eager` is generate() as it is. Variants: `stock` is what
generate() chooses where nobody asks for anything (on a GPU batched_mm in decode steps); `eager`, `batched_mm` and
`grouped_mm` are transformers' implementations by their names; `patched` is warpdecode.hf.patch(model, strict=True);
`null`; `read`, null experts behind a plain read of as many experts as ids drawn evenly name.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import warpdecode
from warpdecode.bench import options
from warpdecode.bench.command import command
from warpdecode.bench.decode_settings import Settings
from warpdecode.bench.random_models import MODELS
from warpdecode.bench.step_kernels import LEAST
from warpdecode.bench.variant_names import DEFAULT, NAMES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m warpdecode.bench.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings = Settings()
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default %(default)s)")
    parser.add_argument("--modes", default=",".join(DEFAULT), help="comma-separated (default %(default)s)")
    parser.add_argument("--batch", default="1,8,32", help="comma-separated numbers of rows (default %(default)s)")
    parser.add_argument(
        "--variants", default=None,
        help="comma-separated: " + ", ".join(NAMES) + "; default: "
        + "; ".join(f"in mode {mode} {', '.join(names)}" for mode, names in DEFAULT.items()),
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=None, help="instead of the model's own number")
    parser.add_argument(
        "--new-tokens", type=int, default=settings.new_tokens,
        help="of a generation (default %(default)s), fewer where it would take more than --seconds",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=settings.most_seconds, help="see there (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=settings.prompt_tokens, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=settings.rounds, help="generations timed (default %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="record each variant's CUDA kernels of a step, too")
    parser.add_argument("--device", default="cuda", choices=options.DEVICES)
    parser.add_argument("--commit", default=None, help="recorded in the rows (default: the source tree's own)")
    parser.add_argument("--output", default=None, help="append the rows to this file as JSON lines")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Puts what the texts of the options say in their place. Raises ValueError, naming the option."""
    options.checked("--device", options.device, args.device)
    options.checked("--seconds", options.positive, args.seconds)
    args.models = options.checked("--models", options.names, args.models, MODELS)
    args.modes = options.checked("--modes", options.names, args.modes, DEFAULT)
    if args.variants is not None:
        args.variants = options.checked("--variants", options.names, args.variants, NAMES)
    args.batch = options.checked("--batch", options.numbers, args.batch)
    least = {"layers": 1, "new_tokens": LEAST if args.kernels else 2, "prompt_tokens": 1, "rounds": 1}
    for name, number in least.items():
        options.checked("--" + name.replace("_", "-"), options.at_least, getattr(args, name), number)
    if args.kernels and args.device != "cuda":
        raise ValueError(f"--kernels was given with --device {args.device}, expected a CUDA device")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line(row: dict) -> str:
    name = f"{row['model']} {row['mode']} batch {row['batch']} {row['variant']}"
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    speed, step = row["tokens_per_second"], row["step_ms"]["median"]
    stock = f", {row['ratio_to_stock']:.2f} of stock" if row["ratio_to_stock"] else ""
    null = f", {row['of_null']:.2f} of null" if row["of_null"] else ""
    kernels = "".join(
        f"\n  {kernel['microseconds']:8.1f} us in {kernel['launches']:5.1f} launches a step: {kernel['name']}"
        for kernel in row.get("kernels", {}).get("longest", ())
    )
    if kernels:
        kernels = f"\n  busy {row['kernels']['busy_ms']:.2f} ms in {row['kernels']['launches']:.0f} launches" + kernels
    return (
        f"{name} ({row['implementation']}): {speed['median']:.1f} tokens/s ({speed['p10']:.1f} to {speed['p90']:.1f}), "
        f"{step:.2f} ms a step{stock}{null}{kernels}"
    )


@command("warpdecode.bench.end_to_end")
def main(argv: list[str] | None = None, sizes: dict | None = None, compile_config=None) -> int:
    """Command line. Returns the exit code: 0 all was measured, 1 something could not be, 2 wrong usage.

    sizes: what of a model's configuration is to differ. compile_config: of transformers.
    """
    args = _parser().parse_args(argv)
    from warpdecode.bench import machine, timers, variants
    from warpdecode.bench.decode_models import Models

    with contextlib.ExitStack() as stack:
        try:
            _check(args)
            append = options.checked("--output", stack.enter_context, options.appended(args.output))
        except ValueError as error:
            print(f"warpdecode.bench.end_to_end: {error}", file=sys.stderr)
            return 2
        try:
            warpdecode.get_num_threads()
            stack.enter_context(variants.registered())
        except (RuntimeError, ValueError) as error:  # an environment variable; the version of transformers
            print(f"warpdecode: {str(error).removeprefix('warpdecode: ')}", file=sys.stderr)
            return 1
        if args.device == "cpu":
            stack.enter_context(timers.torch_threads())
        found = machine.environment(args.device, args.commit, args)
        settings = Settings(
            args.new_tokens, args.prompt_tokens, args.rounds, args.seconds, compile_config, args.kernels
        )
        models = Models(args, settings, sizes or {}, _say)
        for row in models.rows():
            print(_line(row), flush=True)
            append({**row, "environment": found})
    return 0 if models.complete else 1


if __name__ == "__main__":
    sys.exit(main())
