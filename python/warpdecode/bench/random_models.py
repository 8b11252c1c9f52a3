"""Models of real sizes with random weights, and twins of them: each variant has a model of its own on the same weights.

No checkpoint is needed: neither the time of a decode step nor the rounding of its logits depends on what the weights
say. Which experts the tokens choose does; a row says how many they were.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command's --help names the models without torch
    import torch

QWEN3_30B_A3B = {
    "num_hidden_layers": 48, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
# The text model; its 25 sliding layers have the heads named first, its 5 full ones two heads of 512, keys as values.
GEMMA4_26B_A4B = {
    "num_hidden_layers": 30, "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "num_global_key_value_heads": 2,
    "global_head_dim": 512, "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704,
}  # fmt: skip


def _qwen3(**sizes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_30B_A3B | sizes)


def _gemma4(**sizes):
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM, Gemma4TextConfig(**GEMMA4_26B_A4B | sizes)


# By their names in warpdecode.shapes.
MODELS: dict[str, Callable] = {"qwen3-30b-a3b": _qwen3, "gemma4-26b-a4b": _gemma4}


def build(name: str, device: str, **sizes) -> torch.nn.Module:
    """The model in bfloat16, random weights, made on the device. sizes: what of its configuration is to differ."""
    import torch

    kind, config = MODELS[name](**sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with a configuration of its own and the same tensors, so that it takes no memory."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
