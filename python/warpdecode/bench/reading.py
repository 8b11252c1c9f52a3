"""Experts that read their weights and compute nothing: null experts behind a plain read, the bound of what reads.

In a step of `generate()` the memory is shared with everything else that a model does, so a read there takes longer than
in a benchmark of its own. What a step takes with these experts, no kernel that reads each expert once can beat.
"""

from __future__ import annotations

import torch

from warpdecode.bench.candidates import read_memory


def experts_met(experts: int, top_k: int, tokens: int) -> int:
    """How many distinct experts `tokens` tokens name, on average, ids drawn evenly: an expert is missed by each token
    with probability 1 - K/E."""
    return round(experts * (1 - (1 - top_k / experts) ** tokens))


@torch.library.custom_op("warpdecode_bench::read_experts", mutates_args=())
def read_experts(
    hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, top_k: int
) -> torch.Tensor:
    """A copy of the hidden states [T, H], once as many of the experts are read as experts_met() says."""
    sink = torch.empty(16, dtype=torch.uint8, device=hidden_states.device)
    met = experts_met(len(gate_up_proj), top_k, len(hidden_states))
    for matrix in (gate_up_proj, down_proj):
        read_memory(matrix.detach()[:met], sink)()
    return hidden_states.clone()


@read_experts.register_fake
def _(hidden_states, gate_up_proj, down_proj, top_k):
    return torch.empty_like(hidden_states)
