"""The demo's task: written additions, the split that keeps some of them out of training, and the scoring.

A prompt is ``347+285=``. The model answers with the columns worked out from the right, each with the carry of the
column before, and then the sum::

    347+285=7+5=12, 4+8+1=13, 3+2+1=6: 632

The working keeps every token a local decision (two digits and a carry), which is why so small a model can learn it,
and it makes the answer long enough (some thirty tokens) to be worth decoding. A missing digit is worked as 0. The
answer is what follows the last colon; it reads as a plain number, most significant digit first.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator

LARGEST = 999
"""Both numbers of a sum lie in 0..LARGEST."""

HELD_OUT_SHARE = 10
"""One pair in this many is never trained on."""

CHARACTERS = "0123456789+=,: "
"""Every character that a prompt or an answer is written with."""

_PROMPT = re.compile(r"\s*(\d+)\+(\d+)=\s*")
_SPECIAL = re.compile(r"<(?:pad|eos)>")


def prompt_text(a: int, b: int) -> str:
    """Return the prompt that asks for ``a + b``."""
    return f"{a}+{b}="


def worked_answer(a: int, b: int) -> str:
    """Return the text the model is taught to write after ``prompt_text(a, b)``."""
    width = max(len(str(a)), len(str(b)))
    columns, carry = [], 0
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{', '.join(columns)}: {a + b}"


def is_held_out(a: int, b: int) -> bool:
    """Tell whether the pair is kept out of training.

    The split hashes the unordered pair, so a pair and its mirror image (``a+b`` and ``b+a``) are on the same side,
    and it depends on nothing but the two numbers, so that anyone can recompute it.
    """
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def sample_pairs(rng: random.Random, held_out: bool) -> Iterator[tuple[int, int]]:
    """Yield pairs of one side of the split for ever, drawn by ``rng``.

    Lengths are drawn first: drawn uniformly, nine numbers in ten would have three digits and the short ones would
    hardly be seen.
    """
    starts = (0, 10, 100)
    while True:
        low_a, low_b = rng.choices(starts, weights=(1, 3, 8), k=2)
        a = rng.randrange(low_a, min(max(10, low_a * 10), LARGEST + 1))
        b = rng.randrange(low_b, min(max(10, low_b * 10), LARGEST + 1))
        if is_held_out(a, b) == held_out:
            yield a, b


def distinct_held_out(count: int, seed: int) -> list[tuple[int, int]]:
    """Return ``count`` different held-out pairs, the same ones for the same seed."""
    pairs: dict[tuple[int, int], None] = {}
    source = sample_pairs(random.Random(seed), held_out=True)
    while len(pairs) < count:
        pairs[next(source)] = None
    return list(pairs)


def prompts_jsonl(count: int = 128, seed: int = 2024) -> str:
    """Return the text of the shipped prompts file: one held-out prompt and its right answer a line."""
    rows = ({"prompt": prompt_text(a, b), "answer": str(a + b)} for a, b in distinct_held_out(count, seed))
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_correct(prompt: str, text: str) -> bool:
    """Tell whether a generated text ends in the right sum for ``prompt``.

    ``text`` is what the model wrote, with or without the prompt before it and the special tokens around it. Its
    answer is what follows the last colon, or the whole text where it has none (a bare ``632``). The answer has to be
    the sum and nothing more; the working before the colon is not judged.
    """
    asked = _PROMPT.fullmatch(prompt)
    if asked is None:
        raise ValueError(f"not an addition prompt: {prompt!r}")
    written = _SPECIAL.sub("", text).strip().removeprefix(prompt.strip())
    return written.rpartition(":")[2].strip() == str(int(asked[1]) + int(asked[2]))
