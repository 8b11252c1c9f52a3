"""PEFT's adapters on the experts' weights: served with the weights as they are at each call, never with stale ones."""

from contextlib import nullcontext

import pytest
import torch

import hf_models
import hf_outside
import warpdecode.hf

peft = pytest.importorskip("peft")

# FP32: the kernels and grouped_mm keep FP32 sums and differ in their order; the logits are of order 3.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def _model():
    return hf_models.build("qwen3_moe", implementation="grouped_mm").requires_grad_(False)


def _config(rank):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.LoraConfig(r=rank, target_modules=[], target_parameters=targets)


def _adapted(model):
    model = peft.get_peft_model(model, _config(4)).eval()
    _draw(model, 3)
    return model


@torch.no_grad()
def _draw(model, seed):
    """New adapter weights, which start as products with zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(hf_models.prompt()).logits


@pytest.fixture(params=["patched before", "patched after"])
def models(request):
    """(an adapted model of transformers alone, the same one patched before or after the adapter came)."""
    plain = _adapted(_model())
    patched = _adapted(warpdecode.hf.patch(_model())) if request.param == "patched before" else _adapted(_model())
    return plain, warpdecode.hf.patch(patched) if request.param == "patched after" else patched


def _assert_alike(models) -> torch.Tensor:
    plain, patched = models
    with hf_models.no_fallback(), hf_models.counted_kernel_calls() as served:
        got = _logits(patched)
    assert len(served) == hf_models.MOE_LAYERS
    expected = _logits(plain)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    return expected


def test_the_adapter_counts_and_is_never_stale(models):
    seen = [_assert_alike(models)]
    for seed in (4, 5):
        for model in models:
            _draw(model, seed)
        seen.append(_assert_alike(models))
    for model in models:
        model.disable_adapter_layers()
    seen.append(_assert_alike(models))
    torch.testing.assert_close(seen[-1], _logits(_model()), **TOLERANCE)
    for model in models:
        model.enable_adapter_layers()
    assert torch.equal(_assert_alike(models), seen[2])
    for i, first in enumerate(seen):
        assert not any(torch.allclose(first, other, rtol=0.01, atol=0.01) for other in seen[i + 1 :])


@torch.no_grad()
def _experts_calls(model, given=None) -> list[tuple]:
    """(arguments, output) of each experts module in one forward; `given` are calls whose arguments take the place of
    the model's own, so that what differs between two models is the experts alone."""
    calls, rest = [], list(given or [])
    hooks = []
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            if given is not None:
                hooks.append(module.register_forward_pre_hook(lambda *_: rest.pop(0)[0]))
            hooks.append(module.register_forward_hook(lambda _, *call: calls.append(call)))
    model(hf_models.prompt().to(model.device))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_on_the_gpu_an_adapted_layer_is_its_own_path_but_for_roundings(models):
    plain, patched = (model.to("cuda", torch.bfloat16) for model in models)
    seen = []
    for seed in (4, 5):
        for model in (plain, patched):
            _draw(model, seed)
        expected = _experts_calls(plain)
        with hf_models.no_fallback(), hf_models.counted_kernel_calls() as served:
            got = _experts_calls(patched, expected)
        assert len(served) == len(got) == len(expected) == hf_models.MOE_LAYERS
        for (_, ours), (_, own) in zip(got, expected, strict=True):
            hf_outside.assert_alike(ours, own)
        seen.append(got[0][1])
    assert not torch.allclose(*seen, rtol=0.01, atol=0.01)


def test_compiled(models):
    plain, patched = models
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager")
    for seed in (4, 5):
        for model in models:
            _draw(model, seed)
        with hf_models.counted_kernel_calls() as served:
            torch.testing.assert_close(_logits(compiled), _logits(plain), **TOLERANCE)
        assert served


@pytest.mark.parametrize("order", ["patched before", "patched after"])
def test_adapters_on_llama_4_s_experts_are_handed_back_by_their_name(order):
    targets = [f"feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets)
    with pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match="ParamWrapper"):
        model = hf_outside.build("llama4")
        if order == "patched before":
            warpdecode.hf.patch(model, strict=True)
            warpdecode.hf.patch(model)
        model = peft.get_peft_model(model, config).eval()
        _draw(model, 3)
        if order == "patched after":
            warpdecode.hf.patch(model)
        got = _logits(model)
    assert torch.equal(got, _logits(warpdecode.hf.unpatch(model)))


def test_merged_adapters(models):
    before = _assert_alike(models)
    for model in models:
        model.merge_adapter()
    torch.testing.assert_close(_assert_alike(models), before, **TOLERANCE)
    for model in models:
        model.unmerge_adapter()
    torch.testing.assert_close(_assert_alike(models), before, **TOLERANCE)
    _assert_alike([model.merge_and_unload() for model in models])


def test_two_adapters_by_turns(models):
    seen = []
    for model in models:
        model.add_adapter("second", _config(2))
        _draw(model, 6)
    for name in ("default", "second", "default"):
        for model in models:
            model.set_adapter(name)
        seen.append(_assert_alike(models))
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], rtol=0.01, atol=0.01)


def test_training_the_adapter_takes_the_model_s_own_path(models):
    gradients = []
    for model in models:
        model.zero_grad()
        with (
            hf_models.counted_kernel_calls() as served,
            pytest.warns(UserWarning) if model is models[1] else nullcontext(),
        ):
            model(hf_models.prompt()).logits.sum().backward()
        assert not served
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g is not None and g.any() for g in gradients[0])
