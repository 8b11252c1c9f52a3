"""transformers' own experts implementations as peers: eager, grouped_mm and batched_mm."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn

from warpdecode.bench.candidates import Candidate, flops
from warpdecode.bench.row import LONG

_MOST_COPIED_BYTES = 4 * 10**9
_EAGER_CALLS = 4


def load():
    """Imports transformers. Raises what that raises."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return Qwen3MoeExperts


def _module(gate_up, down, activation):
    """The expert module as transformers' functions see it."""
    from transformers.activations import ACT2FN

    experts, hidden, intermediate = down.shape
    config = types.SimpleNamespace(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate,
        hidden_act="silu" if activation == "silu" else "gelu_pytorch_tanh", _experts_implementation="eager",
    )  # fmt: skip
    kind = load()
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.num_experts, module.hidden_dim, module.intermediate_dim = experts, hidden, intermediate
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    module.act_fn = ACT2FN[config.hidden_act]
    module.config = config
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, False, True
    module.has_post_expert_norm = module._is_expert_parallel = False
    return module


def _call(module, implementation, *inputs):
    module.config._experts_implementation = implementation
    return module(*inputs)


def candidates(layers, inputs: list, *, eager: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """transformers' paths that make sense for this number of tokens, and of the others why not. eager: the loop over
    the experts on CUDA, too."""
    tokens = len(inputs[0][0])
    modules = [
        _module(gate_up, down, layers.shape.activation)
        for gate_up, down in zip(layers.gate_up, layers.down, strict=True)
    ]
    prepared = [(x, ids, weights.to(x.dtype)) for x, ids, weights in inputs]

    def candidate(implementation):
        calls = [
            functools.partial(_call, modules[i % layers.copies], implementation, *call)
            for i, call in enumerate(prepared)
        ]
        # a loop over the experts, with a device-to-host read each; grouped_mm falls back to one unless bfloat16
        loop = implementation == "eager" or (implementation == "grouped_mm" and layers.dtype != torch.bfloat16)
        calls = calls[:_EAGER_CALLS] if loop and layers.device == "cuda" else calls
        return Candidate(calls, flops(layers, tokens), capturable=not loop)

    names = ["grouped_mm", "batched_mm"]
    if eager or layers.device != "cuda":
        names.insert(0, "eager")
    left_out = {}
    if tokens >= LONG:
        left_out = {name: f"not timed from {LONG} tokens on" for name in names if name != "grouped_mm"}
    elif tokens * layers.shape.top_k * layers.expert_bytes > _MOST_COPIED_BYTES:
        left_out["batched_mm"] = f"it copies an expert per route, over {_MOST_COPIED_BYTES / 1e9:.0f} GB"
    found = {f"transformers {name}": candidate(name) for name in names if name not in left_out}
    return found, {f"transformers {name}": why for name, why in left_out.items()}
