"""The layer in float64, by torch alone; independent of the library."""

from __future__ import annotations

import torch

_SAMPLE = 4


def sample(tokens: int) -> list[int]:
    """A few tokens spread over the batch: the reference is slow."""
    few = min(tokens, _SAMPLE)
    return [i * (tokens - 1) // max(few - 1, 1) for i in range(few)]


def reference(x, ids, weights, gate_up, down, activation: str) -> torch.Tensor:
    """The layer's output for these tokens, in float64 on the device of the weights."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    x, weights = x.double(), weights.double()
    for token in range(x.shape[0]):
        for slot, expert in enumerate(ids[token].tolist()):
            gate, up = (gate_up[expert].double() @ x[token]).chunk(2)
            if activation == "silu":
                act = torch.nn.functional.silu(gate)
            else:
                act = torch.nn.functional.gelu(gate, approximate="tanh")
            out[token] += weights[token, slot] * (down[expert].double() @ (act * up))
    return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()
