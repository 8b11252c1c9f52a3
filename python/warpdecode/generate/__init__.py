"""``warpdecode generate``: sample from a Hugging Face MoE model on warpdecode's kernels, and survive interruptions.

The output is JSON lines, one sample a line, prompts in the order of the prompts file and each prompt's samples one
after the other, so line ``n`` (from 0) is sample ``n % samples`` of prompt ``n // samples``. A line has these fields:

``prompt``
    the prompt's text, as it was given. It is tokenized as it is: no chat template.
``sample``
    which of the prompt's samples this is, from 0.
``text``
    ``token_ids`` as text, without special tokens.
``token_ids``
    the sampled tokens. An end-of-sequence token ends a sample and is its last id; a sample without one was cut off at
    ``--max-new-tokens``.
``logprobs``
    one number a token, natural logarithm: the log-softmax of the model's raw logits, at temperature 1 and over the
    whole vocabulary, whatever ``--temperature`` and ``--top-p`` are. It is what the model itself says of the token,
    which policy-gradient methods compare with a trainer's recomputation; at ``--temperature 1 --top-p 1`` it is also
    the distribution that the token was drawn from.

Tokens are drawn from the softmax of the logits divided by ``--temperature``, restricted to the smallest set of most
likely tokens that reaches ``--top-p``. Of the model's own generation settings only the end-of-sequence and padding
tokens take part.

**Resuming.** Called again with the same output file, an interrupted run goes on where it was, and the finished file is,
byte for byte, that of an uninterrupted run. Three rules make it so. Each (prompt, sample) has random numbers of its own
(``sampling``). Batches are a fixed partition of the samples, and one that was partly written is computed again as a
whole, because attention and matrix products may round differently in another batch (``rollout``). Lines are only ever
appended, in order, under a lock, and ``OUTPUT.meta.json`` holds every setting that the samples depend on (``journal``,
``settings``); other settings are refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXIT_CODES = """exit codes:
  0    every sample is in the output file (also when they all were there already)
  1    refused or failed, with a sentence on stderr that says why; the same command resumes what was written
  2    wrong usage of the command line
  130  interrupted by Ctrl-C; the same command resumes"""

DESCRIPTION = """Sample from a Mixture-of-Experts model of Hugging Face transformers on warpdecode's kernels.
Without MODEL, the demo model that ships with warpdecode adds numbers, and the right sums are counted.

Each line of the output file is a JSON object: prompt, sample (its index), text, token_ids (the end-of-sequence
token included) and logprobs. logprobs are the model's own: the log-softmax of its raw logits, at temperature 1 and
over the whole vocabulary, whatever --temperature and --top-p are.

Interrupted in any way, the same command resumes where it was, and the finished file equals that of an
uninterrupted run. OUTPUT.meta.json remembers the settings; other settings are refused."""


class GenerateError(Exception):
    """A run that cannot start or go on. Its text is a sentence for the user."""


def _whole(least: int):
    """Return an argparse type: a whole number of at least ``least``."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} was given, at least {least} was expected")
        return value

    whole_number.__name__ = "whole number"  # argparse names the type in "invalid ... value", here and below
    return whole_number


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} was given, a finite number of at least 0 was expected")
    return value


def _top_p(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} was given, a number above 0 and at most 1 was expected")
    return value


_temperature.__name__ = _top_p.__name__ = "number"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = EXIT_CODES
    parser.set_defaults(parser=parser)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name (default: the demo model)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON lines with a 'prompt' field (.jsonl), or one prompt a line (.txt); with another suffix the first "
        "line decides; blank lines are skipped",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where samples are written, or resumed")
    parser.add_argument("--samples", type=_whole(1), default=1, metavar="N", help="samples per prompt (default: 1)")
    parser.add_argument("--batch-size", type=_whole(1), default=32, metavar="B", help="sequences at once (default: 32)")
    parser.add_argument(
        "--max-new-tokens", type=_whole(1), metavar="N", help="longest sample in tokens (default: 256; demo: 40)"
    )
    parser.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0 takes the most likely token (default: 1; demo: 0)"
    )
    parser.add_argument("--top-p", type=_top_p, default=1.0, metavar="P", help="default: 1, the whole vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="e.g. cpu, cuda, cuda:1 (default: cuda where torch and warpdecode can use it)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--strict", action="store_true", help="fail if an expert layer cannot run on warpdecode")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="also run the unpatched model on the same prompts; print both speeds and whether the samples agree "
        "(default: only for the demo)",
    )


def _complete_arguments(args: argparse.Namespace) -> None:
    """Fill in what depends on whether the demo model runs, and refuse what does not go together."""
    args.demo = args.model is None
    if not args.demo and args.prompts is None:
        args.parser.error("--prompts FILE is needed with a MODEL")
    if not args.demo and args.output is None:
        args.parser.error("--output FILE is needed with a MODEL")
    if args.max_new_tokens is None:
        args.max_new_tokens = 40 if args.demo else 256  # the demo's longest right answer has 34 tokens
    if args.temperature is None:
        args.temperature = 0.0 if args.demo else 1.0
    if args.compare is None:
        args.compare = args.demo


def run(args: argparse.Namespace) -> int:
    """Run the command on parsed arguments and return its exit code."""
    _complete_arguments(args)
    # torch's OpenMP threads spin while they wait for one another, unless told otherwise before they start. On a machine
    # that has other work too, that made the demo take 64 s on two cores, and 18 s without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        try:
            from . import command  # imports torch: not for --help and usage errors
        except ImportError as error:
            raise GenerateError(f"{error}; pip install 'warpdecode[hf]' brings what generate needs") from error
        return command.run(args)
    except GenerateError as error:
        print(f"warpdecode generate: error: {error}", file=sys.stderr)
        return 1
