"""Experts the kernels can never serve, whatever their weights: said, or raised, when the model is patched."""

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning


def _raises_when_patched(model: torch.nn.Module, pattern: str) -> None:
    before = {name: (id(m.__dict__.get("config")), set(m.__dict__)) for name, m in model.named_modules()}
    with pytest.raises(WarpDecodeFallbackError, match=pattern):
        warpdecode.hf.patch(model, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match=pattern) as said:
        assert warpdecode.hf.patch(model) is model
    assert len(said) == 1
    assert before == {name: (id(m.__dict__.get("config")), set(m.__dict__)) for name, m in model.named_modules()}


def test_normalised_outputs():
    layer = hf_models.experts_layer()
    layer.has_post_expert_norm = True
    _raises_when_patched(layer, "normalises each expert's output")


def test_a_whole_model_of_another_gate():
    config = hf_models.FAMILIES["qwen3_moe"]()[1]
    config.hidden_act = "tanh"
    model = Qwen3MoeForCausalLM(config)
    _raises_when_patched(model, "none of the 2 .*Qwen3MoeExperts: its gate computes none of")
    warpdecode.hf.register()
    model.set_experts_implementation("warp_decode")
    with pytest.warns(WarpDecodeFallbackWarning, match="Qwen3MoeExperts.*none of"), torch.no_grad():
        model(torch.arange(6)[None])


def test_a_class_outside_the_experts_interface():
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

    config = SwitchTransformersConfig(d_model=32, d_ff=32, num_experts=4)
    _raises_when_patched(
        SwitchTransformersExperts(config),
        "SwitchTransformersExperts: its class does not use transformers' experts",
    )


def test_a_model_without_experts():
    _raises_when_patched(torch.nn.Linear(8, 8), "Linear has no Mixture-of-Experts layers")


def test_transformers_fp8_experts():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    model = hf_models.fp8("grouped_mm")
    experts = hf_models.experts_modules(model)[0]
    _raises_when_patched(model, "FP8Experts: its weights are block-scaled FP8")
    # By name the FP8 experts have a registry of their own; without our name in it they would end in a KeyError.
    warpdecode.hf.register()
    experts.config._experts_implementation = "warp_decode"
    ran = []
    own = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"]
    ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] = lambda self, *inputs: ran.append(self)  # Triton and a GPU otherwise
    try:
        with pytest.warns(WarpDecodeFallbackWarning, match=r"FP8Experts takes its own path \(grouped_mm\)"):
            experts(*hf_models.layer_inputs())
    finally:
        ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] = own
    assert ran == [experts]


def test_a_model_that_can_be_served_in_part():
    model = torch.nn.ModuleList([hf_models.experts_layer(), hf_models.experts_layer(hidden_act="tanh")])
    with pytest.raises(WarpDecodeFallbackError, match="its gate computes none of"):
        warpdecode.hf.patch(model, strict=True)
    with hf_models.counted_kernel_calls() as served:
        for module in model:
            module(*hf_models.layer_inputs())
        assert not served, "a strict patch that raised has patched something"
        with pytest.warns(WarpDecodeFallbackWarning, match="its gate computes none of"):
            warpdecode.hf.patch(model)
        with hf_models.no_fallback():
            for module in model:
                module(*hf_models.layer_inputs())
    assert len(served) == 1
