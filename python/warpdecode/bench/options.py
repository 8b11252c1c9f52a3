"""What the options of the benchmark's commands may be. All are looked at before anything is measured.

Each check takes an option's text and raises ValueError with what it was and what was expected; `checked` puts the
option's name before it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator

DEVICES = ("cpu", "cuda")  # of several GPUs the first that CUDA_VISIBLE_DEVICES leaves


def checked(option: str, check: Callable, *values):
    """check(*values), its refusal under the option's name."""
    try:
        return check(*values)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def names(text: str, known: Iterable[str]) -> list[str]:
    """A comma-separated list of names among `known`."""
    known, found = list(known), text.split(",")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"was {', '.join(unknown)}, expected some of {', '.join(known)}")
    return found


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers of at least 1."""
    found = text.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in found):
        raise ValueError(f"was {text}, expected whole numbers of at least 1, separated by commas")
    return [int(number) for number in found]


def at_least(number: float | None, least: int):
    """A number that may be left away."""
    if number is not None and not number >= least:
        raise ValueError(f"was {number}, expected at least {least}")
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
    """A function that appends a row to a file of JSON lines, or does nothing where there is no path."""
    if path is None:
        yield lambda row: None
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - only its opening may be refused, not what follows
    except OSError as error:
        raise ValueError(f"was {path}, expected a file that can be written: {error.strerror}") from None
    with file:
        yield lambda row: print(json.dumps(row), file=file, flush=True)
