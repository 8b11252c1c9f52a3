"""Copies of one layer's weights, and fresh random calls of it: a seed gives the same ones in every process."""

from __future__ import annotations

import torch

from warpdecode.shapes import Shape

# Room for more copies than the last-level cache asks for, so that small calls touch other experts each time, too.
_SPARE_BYTES = 8 * 10**9


def _seeded(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed % 2**63)  # any whole number is a seed


class Layers:
    """One layer's weights, copied so often that a call finds nothing in the cache that an earlier call has read."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, cache_bytes: int, seed: int):
        self.shape, self.dtype, self.device, self.seed = shape, dtype, device, seed
        self.expert_bytes = shape.bytes_per_expert(dtype.itemsize)
        layer_bytes = shape.experts * self.expert_bytes
        self.copies = max(2, -(-4 * cache_bytes // layer_bytes))
        if device == "cuda":
            # Two copies of a large layer exceed the cache, yet a token or two read little of them: with more copies the
            # calls in between read more than the cache holds before a copy's turn comes again.
            spare = min(_SPARE_BYTES, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // 8)
            wanted = -(-4 * cache_bytes // (shape.top_k * self.expert_bytes))
            self.copies = max(self.copies, min(wanted, spare // layer_bytes))
        # A copy's two matrices lie in one piece, so that one plain read can have the bytes of any number of experts.
        first = torch.empty(layer_bytes // dtype.itemsize, dtype=dtype, device=device)
        generator = _seeded(device, seed)
        for weights in self._matrices(first):
            weights.normal_(0, weights.shape[-1] ** -0.5, generator=generator)
        # The cache knows addresses, not values: drawing once is enough.
        self.flat = [first, *(first.clone() for _ in range(self.copies - 1))]
        self.gate_up, self.down = zip(*map(self._matrices, self.flat), strict=True)

    def _matrices(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj [E, 2I, H] and down_proj [E, H, I] of one copy, views of it."""
        shape = self.shape
        gate_up, down = flat.split((2 * flat.numel() // 3, flat.numel() // 3))
        return (
            gate_up.view(shape.experts, 2 * shape.intermediate, shape.hidden),
            down.view(shape.experts, shape.hidden, shape.intermediate),
        )

    def inputs(self, tokens: int, routing: str, calls_of) -> list[tuple]:
        """(hidden_states, topk_ids, topk_weights) of each call of a round, from a seed of this T's own.

        calls_of: given a call's distinct bytes, how many calls a round has.
        """
        generator = _seeded(self.device, 1_000_003 * (self.seed + 1) + tokens)
        first = self._call(tokens, routing, generator)
        calls = calls_of(self.distinct(first[1]) * self.expert_bytes)
        return [first, *(self._call(tokens, routing, generator) for _ in range(calls - 1))]

    @staticmethod
    def distinct(ids: torch.Tensor) -> int:
        """How many experts the routes of a call name."""
        return len(torch.unique(ids))

    def _call(self, tokens: int, routing: str, generator: torch.Generator) -> tuple:
        shape, place = self.shape, {"device": self.device, "generator": generator}
        odds = torch.ones(shape.experts, device=self.device)
        if routing == "zipf":  # popularity falls with the rank; which experts are popular is drawn per call
            ranks = torch.randperm(shape.experts, **place) + 1
            odds = 1.0 / ranks
        rows = 1 if routing == "same" else tokens
        ids = torch.multinomial(odds.repeat(rows, 1), shape.top_k, generator=generator)  # distinct in a token
        ids = ids.expand(tokens, -1).contiguous()
        x = torch.randn(tokens, shape.hidden, **place).to(self.dtype)
        weights = torch.rand(tokens, shape.top_k, **place)
        return x, ids, weights / weights.sum(1, keepdim=True)
