"""A small trained Mixture-of-Experts model that ships with warpdecode, so that a demo needs no download.

It has Qwen3-MoE's architecture (4 layers, 16 experts, 4 of them a token) and a character tokenizer, and it adds numbers
of up to three digits, writing out the columns first::

    347+285=7+5=12, 4+8+1=13, 3+2+1=6: 632

The columns go from the right to the left; the sum after the colon reads as usual. ``warpdecode.demo.task`` defines the
task, ``warpdecode.demo.train`` trains the model and measures it, ``model/README.md`` is its card. torch and
transformers are imported only when a function needs them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .task import is_correct

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["is_correct", "load", "load_prompts", "model_path", "prompts_path"]

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Return the folder of the shipped model, which ``from_pretrained`` takes as it is."""
    return _HERE / "model"


def prompts_path() -> Path:
    """Return the file of held-out prompts: JSON lines, each with a ``prompt`` and its right ``answer``."""
    return _HERE / "prompts.jsonl"


def load_prompts() -> list[dict[str, str]]:
    """Return the rows of the prompts file."""
    with prompts_path().open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load(
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    **kwargs: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the shipped model and its tokenizer through transformers.

    Args:
        dtype: what the weights are loaded as; ``"auto"`` keeps the stored bfloat16.
        device: where the model goes.
        folder: a model folder to load in the shipped one's place, e.g. one just trained.
        **kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``, e.g. ``experts_implementation``.

    Returns:
        The model, in evaluation mode, and the tokenizer, which pads on the left.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path() if folder is None else folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
