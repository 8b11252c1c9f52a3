"""What the options of the benchmark's commands may be. All are looked at before anything is measured.

Each check takes an option's text and raises ValueError with what it was and what was expected; `checked` puts the
option's name before it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

DEVICES = ("cpu", "cuda")  # of several GPUs the first that CUDA_VISIBLE_DEVICES leaves


def checked(option: str, check: Callable, *values):
    """check(*values), its refusal under the option's name."""
    try:
        return check(*values)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def names(text: str, known: Iterable[str], expected: str = "some of") -> list[str]:
    """A comma-separated list of names among `known`, each of them once."""
    known, found = list(known), _listed(text)
    unknown = [name or "an empty name" for name in found if name not in known]
    if unknown:
        raise ValueError(f"was {', '.join(unknown)}, expected {expected} {', '.join(known)}")
    return found


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers of at least 1, each of them once."""
    found = _listed(text)
    if not all(number.isdecimal() and int(number) for number in found):
        raise ValueError(f"was {text}, expected whole numbers of at least 1, separated by commas")
    return list(dict.fromkeys(map(int, found)))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def at_least(number: float | None, least: int):
    """A number that may be left away."""
    if number is not None and not number >= least:
        raise ValueError(f"was {number}, expected at least {least}")
    return number


def positive(number: float) -> float:
    """A finite number greater than 0, which neither nan nor inf is."""
    if not 0 < number < math.inf:
        raise ValueError(f"was {number}, expected a finite number greater than 0")
    return number


def device(asked: str | None) -> str:
    """The device asked for, or the best there is, as far as both torch and this library can use it."""
    import torch

    import warpdecode

    usable, why = warpdecode.cuda_usable()
    if usable and not torch.cuda.is_available():
        usable, why = False, f"torch {torch.__version__} sees no GPU"
    if asked not in (None, *DEVICES):
        raise ValueError(f"was {asked}, expected {' or '.join(DEVICES)}")
    if asked == "cuda" and not usable:
        raise ValueError(f"was cuda, expected cpu: {why}")
    return asked or ("cuda" if usable else "cpu")


@contextlib.contextmanager
def appended(path: str | None) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to a file of JSON lines, or does nothing where there is no path.

    A number that is none, which JSON has no word for, is written as null.
    """
    if path is None:
        yield lambda row: None
        return
    try:
        cut = _cut_line(path)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - only its opening may be refused, not what follows
    except OSError as error:
        raise ValueError(f"was {path}, expected a file that can be written: {error.strerror}") from None
    with file:
        if cut:  # on its own line it alone is unreadable, not the next row, too
            print(f"{path}: line {cut} has no end, as after an interrupted run; rows go behind it", file=sys.stderr)
            print(file=file, flush=True)
        yield lambda row: print(json.dumps(_finite(row), allow_nan=False), file=file, flush=True)


def _cut_line(path: str) -> int:
    """The number of a file's last line if nothing ends it, or 0."""
    if not Path(path).is_file():  # a pipe can be written to, but not looked at
        return 0
    content = Path(path).read_bytes()
    return content.count(b"\n") + 1 if content and not content.endswith(b"\n") else 0


def _finite(value):
    """A row's value with None for each number in it that is nan or infinite."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
