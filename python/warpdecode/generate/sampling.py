"""Drawing tokens such that a sample depends on its own logits and its own random numbers, and on nothing else.

A token is the image of one uniform number under the inverse of the cumulative distribution over the vocabulary. The
uniform numbers are a hash of (seed, prompt, sample, step), so they need no state that an interruption could lose and
do not depend on which samples share a batch.

The cumulative sum is taken in integers. A floating-point sum of a whole vocabulary depends on the order that a device
adds in, which may change with the shape and, on GPUs, from run to run; integers add up to the same in any order.

This runs inside ``model.generate`` as a logits processor, and not as a decoding loop of our own: the model's cache
(sliding windows, linear attention and so on), positions, masks and stopping stay those of transformers. The processor
sees the raw logits, draws, and hands back scores that leave only the drawn token, which ``generate`` then takes
greedily. ``generate``'s own sampling draws from one global generator for the whole batch, so there a sample would
depend on its neighbours and on the steps before an interruption.
"""

from __future__ import annotations

import hashlib

import torch
from transformers import LogitsProcessor

RESOLUTION = 40
"""Probabilities are whole multiples of 2**-40 of the most likely token's: the tokens rounded away (27.7 below it in
logits) have less than 1e-7 together in a vocabulary of 100,000, and up to 2**22 tokens add up without overflow."""


def uniform(seed: int, prompt: int, sample: int, step: int) -> float:
    """Return the number in [0, 1) that decides on one token: 53 bits of a hash of its coordinates."""
    text = f"warpdecode generate/{seed}/{prompt}/{sample}/{step}"
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def token_weights(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return integers in proportion to the probabilities of the tokens.

    Args:
        logits: raw logits, ``[rows, vocabulary]``, float64.
        temperature: above 0.
        top_p: the smallest set of most likely tokens whose probability reaches this is kept, the rest gets 0. Among
            equally likely tokens the smaller id counts as more likely.

    Returns:
        int64, of the shape of ``logits``.
    """
    # The maximum is subtracted first, so that a tiny temperature gives exp(0) and exp(-inf), never inf - inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    weights = (scaled.exp() * 2.0**RESOLUTION).long()
    if top_p < 1:
        descending, order = weights.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(-1) - descending
        kept = descending * (before < top_p * weights.sum(-1, keepdim=True))
        weights = torch.zeros_like(weights).scatter(-1, order, kept)
    return weights


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return one token per row, ``[rows, 1]``: the first whose cumulative weight exceeds its share ``uniforms``.

    Args:
        weights: int64, ``[rows, vocabulary]``; tokens of weight 0 are never drawn.
        uniforms: float64 in [0, 1), ``[rows]``.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total: a uniform is at most 1 - 2**-53, which in float64 takes at least the last unit off any product.
    share = (uniforms[:, None] * total).long()
    # Clamped for rows of NaN, whose weights mean nothing: an id beyond the vocabulary would crash the device before the
    # NaN is reported.
    return torch.searchsorted(cumulative, share, right=True).clamp_(max=weights.shape[-1] - 1)


class Draw(LogitsProcessor):
    """Picks the next token of each sequence in a batch, for ``model.generate(..., do_sample=False)``.

    Args:
        keys: the (prompt index, sample index) of each sequence.
        seed: of the run.
        temperature: 0 picks the most likely token, the smallest id among equals.
        top_p: see ``token_weights``; no effect at temperature 0.
    """

    def __init__(self, keys: list[tuple[int, int]], seed: int, temperature: float, top_p: float) -> None:
        self._keys, self._seed, self._temperature, self._top_p = keys, seed, temperature, top_p
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores in which only the picked token is possible."""
        logits = scores.double()
        if self._temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            step = len(self._logprobs)
            uniforms = [uniform(self._seed, prompt, sample, step) for prompt, sample in self._keys]
            weights = token_weights(logits, self._temperature, self._top_p)
            token = draw(weights, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
        self._logprobs.append((logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -float("inf")).scatter(-1, token, 0.0)

    def logprobs(self) -> list[list[float]]:
        """Return, for each sequence, the log-softmax of the raw logits at each picked token.

        A NaN or infinity among the logits makes the number of its step NaN.
        """
        return torch.stack(self._logprobs, dim=-1).tolist()
