"""What is looked at once a batch's times are taken. A look that fails costs its own figures, never the times."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from warpdecode.bench.decode_floor import logits_and_distinct, logits_of_another_path, read_milliseconds
from warpdecode.bench.failures import reason


class Looks:
    """Adds figures to rows; where one cannot be had, the reason, to the rows' `not_looked_at`."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def look(self, rows: list[dict], what: str, find: Callable[[], dict]) -> None:
        """Adds what find() returns to each of the rows."""
        try:
            found = find()
        except Exception as error:
            why = f"{what}: {reason(error)}"
            self._say(f"not looked at: {why}")
            for row in rows:
                row["not_looked_at"] = "; ".join([*filter(None, [row.get("not_looked_at")]), why])
        else:
            for row in rows:
                row.update(found)

    def floor(self, rows: list[dict], model: torch.nn.Module, text: torch.Tensor) -> None:
        """How many experts a step of this text reads, and how long that alone takes."""

        def find():
            _, distinct = logits_and_distinct(model, text)
            return {"distinct_experts": distinct, "read_floor_ms": read_milliseconds(model, distinct)}

        self.look(rows, "read floor", find)

    def tokens(self, row: dict, text: torch.Tensor, ours: torch.Tensor, prompt_tokens: int) -> None:
        """Which part of the new tokens that both have is the same."""
        new = slice(prompt_tokens, min(text.shape[1], ours.shape[1]))
        self.look([row], "tokens", lambda: {"equal_tokens": (text[:, new] == ours[:, new]).float().mean().item()})

    def logits(self, row: dict, stock: torch.nn.Module, patched: torch.nn.Module, text: torch.Tensor) -> None:
        """How far our logits of the text that stock wrote are from stock's, and how far those of two of transformers'
        own paths are from each other."""
        theirs = functools.cache(lambda: logits_and_distinct(stock, text)[0])

        def ours():
            found = _difference(theirs(), logits_and_distinct(patched, text)[0])
            return {"largest_logit_difference": found, "logit_standard_deviation": theirs().std().item()}

        def another():
            return {"stock_logit_difference": _difference(theirs(), logits_of_another_path(stock, text))}

        self.look([row], "logits", ours)
        self.look([row], "logits of another path", another)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("not all logits are finite numbers")
    return (one - other).abs().max().item()
