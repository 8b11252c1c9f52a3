"""Small random models of the Mixture-of-Experts families the transformers integration is tested with.

Each is a real transformers model built from its config, two MoE layers deep. Families differ in what surrounds the
experts (fp32 or model-dtype routing weights, shared experts, a dense MLP beside them, silu or gelu_tanh, a text model
nested in a vision-language model), and that is why all of them are here.
"""

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import warpdecode
from warpdecode.hf import WarpDecodeFallbackWarning

VOCAB = 96
PROMPT = (6, 8)  # batch, sequence length

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM, Qwen3MoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM, MixtralConfig(**_COMMON, intermediate_size=96, num_local_experts=8)


def _gemma4():
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM, Gemma4TextConfig(
        **_COMMON,
        head_dim=16,
        global_head_dim=16,
        num_global_key_value_heads=2,
        intermediate_size=48,
        enable_moe_block=True,
        moe_intermediate_size=40,  # a multiple of 8 and of nothing larger
        num_experts=8,
        top_k_experts=2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
    )


def _phimoe():
    from transformers import PhimoeConfig, PhimoeForCausalLM

    return PhimoeForCausalLM, PhimoeConfig(**_COMMON, intermediate_size=96, num_local_experts=8)


def _deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM, DeepseekV3Config(
        **_COMMON | {"num_key_value_heads": 4},
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


def _qwen3_5_text():
    return {
        **_COMMON,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }


def _qwen3_5_moe():
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    return Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**_qwen3_5_text())


def _qwen3_5_moe_vlm():
    # The experts sit in a text model with a config of its own below the one that `generate()` looks at.
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    return Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(
        text_config=_qwen3_5_text(),
        vision_config=vision,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )


def _olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM, OlmoeConfig(**_COMMON, intermediate_size=32, num_experts=8, num_experts_per_tok=2)


FAMILIES = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gemma4": _gemma4,
    "phimoe": _phimoe,
    "deepseek_v3": _deepseek_v3,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen3_5_moe_vlm": _qwen3_5_moe_vlm,
    "olmoe": _olmoe,
}
MOE_LAYERS = 2  # of every model here


def build(family: str, *, implementation: str = "eager", seed: int = 0) -> torch.nn.Module:
    """The family's model in fp32 on the CPU, in eval mode, with an experts implementation chosen by name."""
    model_class, config = FAMILIES[family]()
    torch.manual_seed(seed)
    model = model_class._from_config(config, experts_implementation=implementation, dtype=torch.float32).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights of gain one and more. transformers' initial weights (0.02) leave the logits nearly constant, and then
    experts that compute nonsense go unnoticed."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # norms and biases
        gain = 3.0 if "lm_head" in name or ".gate.weight" in name or "router" in name else 1.3
        parameter.normal_(std=1.0 if "embed_tokens" in name else gain * parameter.shape[-1] ** -0.5)


def prompt(seed: int = 1) -> torch.Tensor:
    """Token ids [batch, sequence], without the special ones."""
    return torch.randint(1, VOCAB - 8, PROMPT, generator=torch.Generator().manual_seed(seed))


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The experts modules in the order in which they run."""
    return [m for m in model.modules() if type(m).__name__.endswith("Experts") and hasattr(m, "down_proj")]


def fp8(implementation: str) -> torch.nn.Module:
    """The Qwen3-MoE model with transformers' block-scaled FP8 experts (their weights are left as they come)."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = build("qwen3_moe", implementation=implementation)
    quantization = SimpleNamespace(
        dequantize=False, weight_block_size=(32, 32), activation_scheme="dynamic", scale_fmt="float", expert_dtype="fp8"
    )
    replace_with_fp8_linear(model, quantization_config=quantization)
    assert type(experts_modules(model)[0]).__name__ == "FP8Experts"
    return model


EXPERTS, HIDDEN = 8, 64


def experts_layer(implementation: str = "grouped_mm", **config) -> torch.nn.Module:
    """One Qwen3-MoE experts module on its own, without gradients, with the config fields given."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    fields = {"hidden_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    full = Qwen3MoeConfig(**fields | config)
    full._experts_implementation = implementation
    layer = Qwen3MoeExperts(full)
    torch.manual_seed(0)
    randomise(layer)
    return layer.requires_grad_(False)


def layer_inputs(tokens: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(hidden states, expert ids, routing weights) for one experts module with 8 experts and a hidden size of 64."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids, weights


@contextmanager
def counted_kernel_calls() -> Iterator[list[int]]:
    """Yields a list whose length is the number of calls the library served so far: one entry, the number of tokens, per
    call of the public `warpdecode.Experts`, which still computes."""
    served = []
    call = warpdecode.Experts.__call__

    def counting(self, hidden_states, *args, **kwargs):
        output = call(self, hidden_states, *args, **kwargs)
        served.append(hidden_states.shape[0])
        return output

    warpdecode.Experts.__call__ = counting
    try:
        yield served
    finally:
        warpdecode.Experts.__call__ = call


@contextmanager
def no_fallback() -> Iterator[None]:
    """A fallback said inside fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WarpDecodeFallbackWarning)
        yield


@torch.no_grad()
def served_calls(model: torch.nn.Module) -> list[int]:
    """The kernels' calls in one forward of a model."""
    with counted_kernel_calls() as served:
        model(prompt())
    return served


def left_on(model: torch.nn.Module) -> list[tuple]:
    """What patching could leave on a model's modules: their classes, and what their own attributes are."""
    return [
        (name, type(module), {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, dict)})
        for name, module in model.named_modules()
    ]


@torch.no_grad()
def check_copies(model):
    """A patched model's deep copy and what is loaded from its file are patched, too, with weights of their own; the
    model's become zeros. Returns both."""
    expected = model(prompt()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), torch.load(file, weights_only=False)
    for parameter in model.parameters():
        parameter.zero_()
    for other in copies:
        assert served_calls(other) and torch.equal(other(prompt()).logits, expected)
    return copies
