"""The command itself: check, load, patch, sample, report."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import __version__ as transformers_version

from warpdecode import demo, hf

from . import GenerateError
from .journal import Journal
from .prompts import read_prompts
from .report import Report
from .rollout import Rollout, load_model, load_tokenizer
from .settings import pick_device, run_settings

INTERRUPTED = 130  # what shells report for a process that SIGINT ended


def _demand_of_the_demo(version: str) -> None:
    """Raises GenerateError for a transformers that cannot load the demo's files, which 5.3 and newer can."""
    if tuple(int(part) for part in version.split(".")[:2]) < (5, 3):
        raise GenerateError(
            f"the demo model needs transformers 5.3 or newer, installed is {version}; with a MODEL of yours, and "
            "--prompts and --output, this one works"
        )


def run(args: argparse.Namespace) -> int:
    """Generate what the (completed) arguments ask for and return the exit code."""
    if args.demo:
        _demand_of_the_demo(transformers_version)
    name = str(demo.model_path()) if args.demo else args.model
    prompts = read_prompts(args.prompts or demo.prompts_path())
    device = pick_device(args.device)
    settings = run_settings(args, name, prompts, device)
    # The threads are not a setting to refuse, since they can simply be set: the CPU kernels of torch share out their
    # sums by the number of threads, so a resumed run takes as many as the first.
    extra = {"threads": torch.get_num_threads()}
    with _output(args) as output, Journal(output, settings, prompts, args.samples, extra) as journal:
        if journal.complete:
            print(f"{output} is complete: it has all {journal.total} samples. Nothing was done.")
            return 0
        torch.set_num_threads(journal.extra["threads"])
        try:
            report = _sample(args, name, prompts, device, journal)
        except hf.WarpDecodeFallbackError as error:  # --strict
            raise GenerateError(str(error)) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise GenerateError(
                f"the memory of {device} is too small for --batch-size {args.batch_size} and --max-new-tokens "
                f"{args.max_new_tokens}: {error}; a smaller --batch-size takes less, with an --output of its own"
            ) from None
        except KeyboardInterrupt:
            print(_interrupted(args.output, journal), file=sys.stderr)
            return INTERRUPTED
        if args.output is not None:
            print(f"{output} is complete: it has all {journal.total} samples.")
        print(report.text())
    return 0


def _interrupted(output: Path | None, journal: Journal) -> str:
    if output is None:
        return "Interrupted. Nothing is kept, because no --output was named."
    written = journal.count_lines()
    if written == journal.total:
        return f"Interrupted. {output} is complete: it has all {written} samples."
    return f"Interrupted: {written} of {journal.total} samples are in {output}. Run the same command again to resume."


@contextlib.contextmanager
def _output(args: argparse.Namespace) -> Iterator[Path]:
    """Give the output file's path, of a temporary file if the demo runs without one."""
    if args.output is not None:
        yield args.output
    else:
        with tempfile.TemporaryDirectory(prefix="warpdecode-") as folder:
            yield Path(folder) / "samples.jsonl"


def _sample(args: argparse.Namespace, name: str, prompts: list[str], device: torch.device, journal: Journal) -> Report:
    rollout = Rollout(
        load_tokenizer(name),
        prompts,
        samples=args.samples,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    rollout.check_prompts()  # before a large model is loaded
    model = load_model(name, args.dtype, device)
    report = Report(is_right=demo.is_correct if args.demo and args.prompts is None else None)
    hf.patch(model, strict=args.strict)
    print(hf.explain(model), file=sys.stderr)  # never a fallback in silence
    if args.compare:
        rollout.warm_up(model)
    if journal.written:
        print(f"Resuming after {journal.written} of {journal.total} samples.", file=sys.stderr)
    with _progress("warpdecode", journal.total, journal.written) as advance:
        for rows in rollout.batches(model, done=journal.written):
            journal.append(rows)
            advance(len(rows))
    report.add_warpdecode(rollout, journal.rows())
    if args.compare:
        hf.unpatch(model)
        rollout.warm_up(model)
        rollout.reset_clock()
        with _progress("transformers alone", journal.total, 0) as advance:
            kept = journal.rows()
            for rows in rollout.batches(model):
                for row in rows:
                    report.compare(next(kept), row)
                advance(len(rows))
        report.add_stock(rollout)
    return report


@contextlib.contextmanager
def _progress(what: str, total: int, done: int):
    """Show a progress bar on stderr; gives a function to call with the number of samples that were added."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda count: progress.advance(task, count)
