"""Small random models, and single modules, whose experts are outside transformers' experts interface."""

import pytest
import torch

import hf_models

_COMMON = {**hf_models._COMMON, "eos_token_id": None}


def _llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM, Llama4TextConfig(
        **_COMMON, head_dim=16, intermediate_size=48, intermediate_size_mlp=64, num_local_experts=8,
        num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=32,
    )  # fmt: skip


def _dbrx():
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM, DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=hf_models.VOCAB, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 64},
    )  # fmt: skip


def _longcat_flash():
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    fields = _COMMON | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    fields.pop("num_hidden_layers")
    return LongcatFlashForCausalLM, LongcatFlashConfig(
        **fields, num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=40, n_routed_experts=8, zero_expert_num=4,
        moe_topk=3, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        head_dim=8,
    )  # fmt: skip


MODELS = {"llama4": _llama4, "dbrx": _dbrx, "longcat_flash": _longcat_flash}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The family's model on the CPU, in eval mode, without gradients."""
    model_class, config = MODELS[family]()
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    hf_models.randomise(model)
    return model.to(dtype)


def class_of(family: str, name: str) -> type:
    """A class of transformers; the test is skipped where the installed release lacks it."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name, None) or pytest.skip(f"this transformers has no {name}")
