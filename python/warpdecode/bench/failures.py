"""What cannot be measured is said, as one line, and the rest goes on."""

from __future__ import annotations

import sys

import torch


def say(text: str) -> None:
    """One line on stderr: whatever is left out is left out with a reason."""
    print(f"warpdecode bench: {text}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def out_of_memory(error: Exception) -> bool:
    """Whether memory was what failed: for the CPU's, torch has no exception of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
