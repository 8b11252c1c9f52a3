"""transformers 5.0 to 5.6, which accept no names of experts implementations but their own: `patch` and
`accelerate_decode` work, by name raises. Runs where such a release is installed (.ci/run brings one), and skips
elsewhere."""

import pytest
import torch

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

transformers = pytest.importorskip("transformers")
if not (5, 0) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 7):
    pytest.skip(f"transformers {transformers.__version__} is none of 5.0 to 5.6", allow_module_level=True)

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
TOKENS = hf_models.PROMPT[0] * hf_models.PROMPT[1]


def test_by_name_is_refused_with_a_sentence():
    with pytest.raises(RuntimeError, match=r"transformers 5\.\d.* by name; 5\.7 and newer do\. .*patch\(model\)"):
        warpdecode.hf.register()
    with pytest.raises(ValueError, match="warp_decode"):  # transformers' own refusal
        hf_models.build("qwen3_moe", implementation="warp_decode")


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_compute_what_they_compute(family, implementation):
    model = hf_models.build(family, implementation=implementation)
    expected, before = model(hf_models.prompt()).logits, hf_models.left_on(model)
    own = model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False)
    warpdecode.hf.patch(model, strict=True)
    assert hf_models.served_calls(model) == [TOKENS] * hf_models.MOE_LAYERS
    assert torch.allclose(model(hf_models.prompt()).logits, expected, atol=1e-3)
    assert torch.equal(model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False), own)
    assert hf_models.left_on(warpdecode.hf.unpatch(model)) == before and not hf_models.served_calls(model)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_served_takes_the_model_s_own_path(implementation):
    model = hf_models.build("qwen3_moe", implementation=implementation)
    expected = model(hf_models.prompt()).logits
    warpdecode.hf.patch(model)
    with pytest.warns(WarpDecodeFallbackWarning, match=rf"own path \({implementation}\).*gradients are needed"):
        got = model(hf_models.prompt()).logits
    assert torch.equal(got, expected) and got.requires_grad


@torch.no_grad()
def test_accelerate_decode_takes_the_place_of_batched_mm_alone():
    models = {name: hf_models.build("qwen3_moe", implementation=name) for name in IMPLEMENTATIONS}
    with warpdecode.hf.accelerate_decode(strict=True):
        assert {name: len(hf_models.served_calls(model)) for name, model in models.items()} == {
            "eager": 0, "grouped_mm": 0, "batched_mm": hf_models.MOE_LAYERS,
        }  # fmt: skip
        with torch.enable_grad(), pytest.raises(WarpDecodeFallbackError, match="gradients are needed"):
            models["batched_mm"](hf_models.prompt())
    assert not hf_models.served_calls(models["batched_mm"])
