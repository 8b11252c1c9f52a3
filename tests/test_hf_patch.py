"""Telling a transformers model to use the kernels: by name, in place, for a scope; and what is left behind."""

import copy
import io
import pickle

import pytest
import torch

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

QWEN = "qwen3_moe"
VLM = "qwen3_5_moe_vlm"


def _model(family: str = QWEN, implementation: str = "eager") -> torch.nn.Module:
    return hf_models.build(family, implementation=implementation)


def _layer(model: torch.nn.Module) -> torch.nn.Module:
    return hf_models.experts_modules(model)[0]


@torch.no_grad()
def _served(model: torch.nn.Module) -> int:
    """How many layers of the model the library serves in one forward."""
    with hf_models.counted_kernel_calls() as served:
        model(hf_models.prompt())
    return len(served)


def _left_on(model: torch.nn.Module) -> list[tuple[str, int | None, tuple[str, ...]]]:
    """What patching could change: each module's config object and attributes, and each config's implementation."""
    modules = [(n, id(m.__dict__.get("config")), tuple(sorted(m.__dict__))) for n, m in model.named_modules()]
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    return [*modules, *sorted((i, c._experts_implementation) for i, c in configs.items())]


# ---- by name


def test_the_name_is_valid_everywhere_after_register(tmp_path):
    warpdecode.hf.register()
    warpdecode.hf.register()
    assert _served(_model(implementation="warp_decode")) == hf_models.MOE_LAYERS
    model = _model()
    model.set_experts_implementation("warp_decode")
    assert _served(model) == hf_models.MOE_LAYERS
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="warp_decode").eval()
    assert _served(loaded) == hf_models.MOE_LAYERS


def test_by_name_a_layer_falls_back_to_grouped_mm_and_says_so_once():
    warpdecode.hf.register()
    model = _model(implementation="warp_decode")
    with pytest.warns(WarpDecodeFallbackWarning, match=r"Qwen3MoeExperts takes its own path \(grouped_mm\)") as said:
        logits = model(hf_models.prompt()).logits
        logits.sum().backward()
    assert len(said) == 1
    with hf_models.no_fallback():
        model(hf_models.prompt())
    assert torch.equal(logits, _model(implementation="grouped_mm")(hf_models.prompt()).logits)
    with pytest.warns(WarpDecodeFallbackWarning):  # another model is told of its own
        _model(implementation="warp_decode")(hf_models.prompt())


def test_by_name_in_a_vision_language_model():
    warpdecode.hf.register()
    model = _model(VLM)
    model.set_experts_implementation("warp_decode")
    assert _served(model) == hf_models.MOE_LAYERS


# ---- patch, unpatch, patched


@pytest.mark.parametrize("family", [QWEN, VLM, "gemma4"])
def test_unpatch_restores_exactly_what_was_there(family):
    model = _model(family)
    before = _left_on(model)
    assert warpdecode.hf.patch(model) is model
    assert _served(model) == hf_models.MOE_LAYERS
    assert warpdecode.hf.unpatch(model) is model
    assert _left_on(model) == before
    assert _served(model) == 0


def test_unpatch_restores_different_implementations_of_a_nested_model():
    model = _model(VLM)
    model.set_experts_implementation({"": "grouped_mm", "text_config": "batched_mm"})
    before = _left_on(model), model.get_experts_implementation()
    warpdecode.hf.unpatch(warpdecode.hf.patch(model))
    assert (_left_on(model), model.get_experts_implementation()) == before
    assert before[1]["text_config"] == "batched_mm"


@pytest.mark.parametrize("not_a_model", ["name", None, 3, torch.nn.Linear], ids=str)
def test_what_is_no_model_is_refused(not_a_model):
    def patched(model):
        with warpdecode.hf.patched(model):
            pass

    for function in (warpdecode.hf.patch, patched, warpdecode.hf.unpatch, warpdecode.hf.explain):
        kind = type(not_a_model).__name__
        with pytest.raises(ValueError, match=f"model: was a {kind}, expected a torch.nn.Module"):
            function(not_a_model)


def test_patching_twice_is_patching_once_with_the_new_strict():
    model = _model()
    before = _left_on(model)
    warpdecode.hf.patch(model, strict=True)
    warpdecode.hf.patch(model)
    with pytest.warns(WarpDecodeFallbackWarning):
        model(hf_models.prompt())
    warpdecode.hf.patch(model, strict=True)
    with pytest.raises(WarpDecodeFallbackError):
        model(hf_models.prompt())
    warpdecode.hf.unpatch(model)
    assert _left_on(model) == before


def test_patching_a_part_of_a_model():
    model = _model()
    warpdecode.hf.patch(model.model.layers[1])
    assert _served(model) == 1
    warpdecode.hf.unpatch(model)
    assert _served(model) == 0


def test_a_scope_ends_with_what_was_before_it():
    model = _model()
    before = _left_on(model)
    with warpdecode.hf.patched(model) as same:
        assert same is model
        assert _served(model) == hf_models.MOE_LAYERS
    assert _left_on(model) == before
    with pytest.raises(KeyError), warpdecode.hf.patched(model):
        raise KeyError
    assert _left_on(model) == before


def test_a_strict_scope_inside_a_patched_model():
    model = warpdecode.hf.patch(_model())
    with warpdecode.hf.patched(model, strict=True), pytest.raises(WarpDecodeFallbackError):
        model(hf_models.prompt())
    assert _served(model) == hf_models.MOE_LAYERS
    with pytest.warns(WarpDecodeFallbackWarning):
        model(hf_models.prompt())


def test_an_unpatch_inside_a_scope_holds_until_its_end():
    model = _model()
    before = _left_on(model)
    with warpdecode.hf.patched(model):
        warpdecode.hf.unpatch(model)
        assert _served(model) == 0
    assert _left_on(model) == before


@pytest.mark.parametrize("family", [QWEN, VLM])
def test_generate_s_switch_of_implementations_goes_below_the_patch(family):
    # What transformers' generate() does around the decode loop on a GPU.
    model = _model(family, implementation="grouped_mm")
    before = _left_on(model)
    warpdecode.hf.patch(model)
    original = model.get_experts_implementation()
    assert "grouped_mm" in original.values()
    model.set_experts_implementation({k: "batched_mm" if v == "grouped_mm" else v for k, v in original.items()})
    assert _served(model) == hf_models.MOE_LAYERS
    with pytest.warns(WarpDecodeFallbackWarning, match=r"own path \(batched_mm\)"):
        model(hf_models.prompt())
    model.set_experts_implementation(original)
    assert _served(model) == hf_models.MOE_LAYERS
    warpdecode.hf.unpatch(model)
    assert _left_on(model) == before


def test_two_models_that_share_a_config_do_not_interfere():
    model_class, config = hf_models.FAMILIES[QWEN]()
    lenient, strict, neither = (model_class(config).eval() for _ in range(3))
    assert lenient.config is strict.config
    warpdecode.hf.patch(lenient)
    warpdecode.hf.patch(strict, strict=True)
    with pytest.raises(WarpDecodeFallbackError):
        strict(hf_models.prompt())
    with pytest.warns(WarpDecodeFallbackWarning):
        lenient(hf_models.prompt())
    assert (_served(lenient), _served(strict), _served(neither)) == (2, 2, 0)
    warpdecode.hf.unpatch(lenient)
    assert (_served(lenient), _served(strict)) == (0, 2)


def test_hooks_that_wrap_forward_before_or_after():
    hooks = pytest.importorskip("accelerate.hooks")  # how device_map="auto" moves inputs and offloaded weights
    model = _model()
    first, second = hf_models.experts_modules(model)
    hooks.add_hook_to_module(first, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with hf_models.no_fallback():
        warpdecode.hf.patch(model)
        hooks.add_hook_to_module(second, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
        assert first.down_proj.device.type == second.down_proj.device.type == "meta"
        assert _served(model) == hf_models.MOE_LAYERS
        for module in (first, second):  # what was brought for one call is not held, or offloading would free nothing
            assert module.__dict__["_warpdecode_layer"].experts is None
        assert _served(model) == hf_models.MOE_LAYERS
    warpdecode.hf.unpatch(model)
    assert _served(model) == 0


# ---- copies and files


@torch.no_grad()
def test_a_deep_copy_is_patched_like_its_original_and_apart_from_it():
    model = warpdecode.hf.patch(_model(VLM))
    expected = model(hf_models.prompt()).logits
    twin = copy.deepcopy(model)
    assert _layer(twin).config.inner is twin.config.text_config
    assert torch.equal(twin(hf_models.prompt()).logits, expected)
    assert _served(twin) == hf_models.MOE_LAYERS
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(hf_models.prompt()).logits, expected)
    warpdecode.hf.unpatch(model)
    assert (_served(model), _served(twin)) == (0, hf_models.MOE_LAYERS)


@pytest.mark.parametrize("how", ["patched", "by name"])
@torch.no_grad()
def test_pickling_a_model_that_ran(how):
    warpdecode.hf.register()
    model = _model(implementation="warp_decode") if how == "by name" else warpdecode.hf.patch(_model())
    expected = model(hf_models.prompt()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(hf_models.prompt()).logits, expected)
    assert _served(loaded) == hf_models.MOE_LAYERS
    pickle.dumps(_layer(model))


@torch.no_grad()
def test_the_state_dict_and_the_saved_model_know_nothing_of_it(tmp_path):
    model = _model()
    keys, config = list(model.state_dict()), model.config.to_dict()
    warpdecode.hf.patch(model)
    expected = model(hf_models.prompt()).logits
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    assert "warp" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert _served(loaded) == 0
    # The saved weights are the model's: FP32 kernels and FP32 grouped_mm agree up to the order of their sums.
    assert torch.allclose(loaded(hf_models.prompt()).logits, expected, atol=1e-4)
    assert _served(warpdecode.hf.patch(loaded)) == hf_models.MOE_LAYERS


def test_the_config_seen_by_a_patched_module_is_the_model_s():
    model = warpdecode.hf.patch(_model())
    config = _layer(model).config
    assert config.num_experts == hf_models.EXPERTS and config._experts_implementation == "warp_decode"
    config.rms_norm_eps = 0.5
    assert model.config.rms_norm_eps == 0.5
    assert model.config._experts_implementation == "eager"
    with pytest.raises(AttributeError):
        _ = config.no_such_field
