"""How many tokens and rounds `generate()` is timed with; without torch, for the command's --help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """new_tokens: of a generation, fewer where it would take more than most_seconds."""

    new_tokens: int = 64
    prompt_tokens: int = 32
    rounds: int = 3
    most_seconds: float = 8.0
    compile_config: Any = None  # of transformers; None: its own choice
    kernels: bool = False  # record the kernels of a step, too: on a GPU
