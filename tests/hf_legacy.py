"""Small random models of transformers 4 with one module an expert: how each family's config is written there."""

import torch

import hf_models

_COMMON = hf_models._COMMON
_SPARSE = {"moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}

# family -> (its classes' prefix, its config's fields)
FAMILIES = {
    "mixtral": ("Mixtral", {"intermediate_size": 40, "num_local_experts": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_SPARSE, "intermediate_size": 64, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_SPARSE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_SPARSE,
            "head_dim": 16,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmo", {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {"intermediate_size": 40, "num_local_experts": 8}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, **_GROUPS, "num_key_value_heads": 4, "moe_intermediate_size": 40, "n_shared_experts": 1},
    ),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, **_GROUPS, "num_key_value_heads": 4, "moe_intermediate_size": 40}),
    "glm4_moe": ("Glm4Moe", {**_GROUPS, "head_dim": 16, "moe_intermediate_size": 40}),
    "dots1": ("Dots1", {**_GROUPS, "head_dim": 16, "moe_intermediate_size": 40, "n_shared_experts": 1}),
    "jamba": (
        "Jamba",
        {
            "intermediate_size": 40, "num_experts": 8, "expert_layer_period": 1, "expert_layer_offset": 0,
            "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "intermediate_size": 64, "moe_intermediate_size": 40, "moe_num_experts": 8, "moe_k": 2,
            "moe_layer_start_index": 0, "moe_num_shared_experts": 1,
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"intermediate_size": 40, "num_experts": 8, "moe_topk": 2, "head_dim": 16}),
    "minimax": ("MiniMax", {"intermediate_size": 40, "num_local_experts": 8, "head_dim": 16}),
    "longcat_flash": (
        "LongcatFlash",
        {
            **_LATENT, "num_key_value_heads": 4, "num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 40,
            "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3, "head_dim": 8,
        },
    ),
}  # fmt: skip


# Those whose experts are a few tensors, and take a weight for every expert.
STACKED = ("gpt_oss", "qwen3_vl_moe")


def build_stacked(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The same of a family in `STACKED`."""
    import transformers
    from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe, modeling_qwen3_vl_moe

    torch.manual_seed(seed)
    if family == "gpt_oss":
        config = transformers.GptOssConfig(
            **_COMMON, head_dim=16, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2,
            rope_scaling={"rope_type": "default"},
        )  # fmt: skip
        model = transformers.GptOssForCausalLM(config)
    else:
        config = configuration_qwen3_vl_moe.Qwen3VLMoeTextConfig(
            **_COMMON, **_SPARSE, head_dim=16, intermediate_size=64,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]},
        )  # fmt: skip
        model = modeling_qwen3_vl_moe.Qwen3VLMoeTextModel(config)
    model = model.eval().requires_grad_(False)
    hf_models.randomise(model)
    return model.to(dtype)


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The family's model on the CPU, in eval mode, without gradients."""
    import transformers

    prefix, fields = FAMILIES[family]
    common = {k: v for k, v in _COMMON.items() if not (family == "longcat_flash" and k == "num_hidden_layers")}
    config = getattr(transformers, f"{prefix}Config")(**common | fields)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().requires_grad_(False)
    hf_models.randomise(model)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "moe_statics"):  # Ernie's router computes in float32, and from_pretrained leaves it there
            module.gate.float()
            module.moe_statics.float()
    return model
