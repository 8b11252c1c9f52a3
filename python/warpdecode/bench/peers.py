"""The peers: transformers' own experts implementations, on the same weights and inputs."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn


class _Calls(list):
    """Calls that cannot be captured in a CUDA graph when `eager`."""

    eager = False


def _module(gate_up, down, activation):
    """The expert module as transformers' functions see it."""
    from transformers.activations import ACT2FN
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, intermediate = down.shape
    config = types.SimpleNamespace(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate,
        hidden_act="silu" if activation == "silu" else "gelu_pytorch_tanh", _experts_implementation="eager",
    )  # fmt: skip
    module = Qwen3MoeExperts.__new__(Qwen3MoeExperts)
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


def transformers_paths(layers, inputs, tokens: int) -> dict:
    """transformers' eager, batched_mm and grouped_mm as lists of calls; empty where transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return {}
    modules = [
        _module(gate_up, down, layers.shape.activation)
        for gate_up, down in zip(layers.gate_up, layers.down, strict=True)
    ]

    def calls(implementation):
        made = _Calls()
        # a loop over the experts, with a device-to-host read each; grouped_mm falls back to one unless bfloat16
        made.eager = implementation == "eager" or (implementation == "grouped_mm" and layers.dtype != torch.bfloat16)
        for i, (x, ids, weights) in enumerate(inputs):
            made.append(
                functools.partial(_call, modules[i % layers.copies], implementation, x, ids, weights.to(x.dtype))
            )
        return made

    names = ["eager", "grouped_mm"]
    if tokens * layers.shape.top_k <= 1024:  # batched_mm copies one expert per route: 9 MB each on Qwen3-30B-A3B
        names.append("batched_mm")
    return {f"transformers {name}": calls(name) for name in names}
