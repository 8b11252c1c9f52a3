"""Modules that only seem to compute what the kernels do, whose calls would not come to them, or whose weights do not
fit: handed back with a reason, and left as they were by the looking."""

import functools
import types

import pytest
import torch
from torch import nn

import hf_models
import hf_outside
import test_hf_outside
import test_hf_separate
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

moe = pytest.importorskip("transformers.integrations.moe")
EXPERTS = type(hf_models.experts_layer())


def _of_class(kind: type, implementation: str = "grouped_mm") -> nn.Module:
    layer = hf_models.experts_layer(implementation)
    layer.__class__ = kind
    return layer


class _SlightlyMoreExperts(EXPERTS):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 1.05 * super().forward(hidden_states, top_k_index, top_k_weights)


class _AddsItsInputExperts(EXPERTS):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) + 0.05 * hidden_states


class _ClampsExperts(EXPERTS):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states.clamp(-4, 4), top_k_index, top_k_weights)


class _DoubledMoe(EXPERTS):  # by its name no experts, by its arguments none that are known
    def forward(self, *call):
        return 2 * super().forward(*call)


class _PassesUsByExperts(EXPERTS):
    @torch.no_grad()
    def forward(self, *call):
        return 2 * EXPERTS.forward.__wrapped__(self, *call)


class _AsksElsewhereExperts(EXPERTS):
    @functools.wraps(EXPERTS.forward.__wrapped__)
    def forward(self, *call):
        return moe.ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *call)


class _CountsBlock(test_hf_separate._Routes):
    def __init__(self, bias: bool = False):
        super().__init__(bias)
        self.register_buffer("counts", torch.zeros(test_hf_separate.E, dtype=torch.long))

    def forward(self, hidden_states):
        out, logits = super().forward(hidden_states)
        self.counts += torch.bincount(logits.argmax(-1), minlength=len(self.counts))
        return out, logits


class _HasCapacity(test_hf_separate._HasMoe):
    def moe(self, hidden_states, topk_indices, topk_weights):
        chosen = nn.functional.one_hot(topk_indices, test_hf_separate.E)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        kept = ((place * chosen).sum(-1) <= 16).to(topk_weights)
        return super().moe(hidden_states, topk_indices, topk_weights * kept)


def _on_the_instance() -> nn.Module:
    layer = hf_models.experts_layer("grouped_mm")
    layer.forward = types.MethodType(lambda self, *call: 2 * EXPERTS.forward.__wrapped__(self, *call), layer)
    return layer


def _block(kind) -> nn.Module:
    return test_hf_separate._built(kind, torch.float32, "cpu")


def _parametrized() -> nn.Module:
    module = test_hf_outside._built("longcat_flash")
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    return module


REFUSED = {
    "0.05 more": (lambda: _of_class(_SlightlyMoreExperts), "differs from the kernels' result on a probe"),
    "its input added": (lambda: _of_class(_AddsItsInputExperts), "differs from the kernels' result on a probe"),
    "its input clamped": (lambda: _of_class(_ClampsExperts), "differs from the kernels' result on a probe"),
    "another name": (lambda: _of_class(_DoubledMoe), "does not use transformers' experts interface"),
    "a decorated forward": (lambda: _of_class(_PassesUsByExperts), "does not ask transformers' experts interface"),
    "another question": (lambda: _of_class(_AsksElsewhereExperts), "does not ask transformers' experts interface"),
    "a forward on the instance": (_on_the_instance, "does not ask transformers' experts interface"),
    "a counter": (lambda: _block(_CountsBlock), "does something besides: it changes counts"),
    "a capacity": (lambda: _block(_HasCapacity), "moe is not the weighted sum"),
    "parametrized": (_parametrized, "it is parametrized"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_handed_back(name):
    build, reason = REFUSED[name]
    module = nn.ModuleList([build(), hf_models.experts_layer("grouped_mm")])
    buffers = [buffer.clone() for buffer in module.buffers()]
    random = torch.get_rng_state()
    assert reason in warpdecode.hf.explain(module)[0].reason
    with pytest.raises(WarpDecodeFallbackError, match=reason):
        warpdecode.hf.patch(module, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match=reason):
        warpdecode.hf.patch(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))


@torch.no_grad()
def test_a_decorated_forward_that_calls_its_base_class_s_falls_back_to_that():
    class DoubledExperts(EXPERTS):
        @torch.no_grad()
        def forward(self, *call):
            return 2 * super().forward(*call)

    layer = _of_class(DoubledExperts, "eager")
    expected = layer(*hf_models.layer_inputs())
    warpdecode.hf.patch(layer, strict=True)
    torch.testing.assert_close(layer(*hf_models.layer_inputs()), expected, rtol=1e-4, atol=1e-4)
    warpdecode.hf.patch(layer)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(WarpDecodeFallbackWarning, match="autocast"):
        assert layer(*hf_models.layer_inputs()).shape == expected.shape


@pytest.mark.parametrize("kind", [test_hf_separate._Routes, test_hf_separate._HasMoe])
def test_looking_calls_no_hook_of_the_router(kind):
    block, calls = _block(kind), []
    block.gate.register_forward_hook(lambda *call: calls.append(1))
    warpdecode.hf.explain(block)
    warpdecode.hf.patch(block, strict=True)
    assert not calls


@torch.no_grad()
def test_a_transposed_view_is_not_read_as_what_was_there():
    layer = warpdecode.hf.patch(hf_models.experts_layer("eager"))  # 2 I == H, so the shape stays
    layer(*hf_models.layer_inputs())
    layer.gate_up_proj.data = layer.gate_up_proj.data.transpose(1, 2)
    with pytest.warns(WarpDecodeFallbackWarning, match="gate_up_proj is not a contiguous"):
        layer(*hf_models.layer_inputs())


@torch.no_grad()
def test_a_weight_for_every_expert_is_not_one_for_every_id():
    layer = warpdecode.hf.patch(hf_models.experts_layer("eager"))
    hidden, ids, _ = hf_models.layer_inputs()
    weights = torch.rand(len(hidden), hf_models.EXPERTS)
    with pytest.warns(WarpDecodeFallbackWarning, match=r"\(5, 2\) and top_k_weights \(5, 8\): not a weight"):
        layer(hidden, ids, weights)


@torch.no_grad()
@pytest.mark.parametrize("cut", [False, True], ids=["strided", "cut"])
def test_weights_of_dbrx_that_do_not_fit_take_the_own_forward(cut):
    module, call = test_hf_outside._built("dbrx"), test_hf_outside._call("dbrx")
    warpdecode.hf.patch(module)(*call)
    for name in ("w1", "v1", "w2") if cut else ("w1",):
        weight = getattr(module.mlp, name)
        weight.data = weight.data[: 4 * test_hf_outside.INTER].clone() if cut else weight.data.t().contiguous().t()
    if cut:
        module.num_experts = module.mlp.moe_num_experts = 4
        call = (call[0], call[1] % 4, call[2])
        with hf_models.no_fallback():
            got = module(*call)
    else:
        with pytest.warns(WarpDecodeFallbackWarning, match="w1 is not a contiguous"):
            got = module(*call)
    torch.testing.assert_close(got, warpdecode.hf.unpatch(module)(*call), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_a_default_device_is_not_where_the_probe_is(family):
    model = hf_outside.build(family)
    with torch.device("meta"):
        warpdecode.hf.patch(model, strict=True)
    assert hf_models.served_calls(model)


def test_a_traced_module_has_no_layers_to_patch():
    traced = torch.jit.trace(hf_models.experts_layer("batched_mm"), hf_models.layer_inputs())
    assert not warpdecode.hf.explain(traced)
    with pytest.warns(WarpDecodeFallbackWarning, match="no Mixture-of-Experts layers that could be patched"):
        warpdecode.hf.patch(traced)


@torch.no_grad()
def test_a_hook_of_all_modules_sees_those_within_the_experts():
    block, seen = warpdecode.hf.patch(_block(test_hf_separate._HasMoe)), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *call: seen.append(module))
    try:
        with pytest.warns(WarpDecodeFallbackWarning, match="a hook of all modules is registered"):
            block(torch.randn(2, 3, test_hf_separate.H))
    finally:
        hook.remove()
    assert block.experts[0].gate_proj in seen or block.experts[1].gate_proj in seen


def test_shared_experts_are_no_layer():
    class SharedExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))

        def forward(self, hidden_states, gammas):
            return hidden_states

    model = nn.ModuleList([SharedExperts(), hf_models.experts_layer("grouped_mm")])
    assert [row.name for row in warpdecode.hf.explain(model)] == ["1"]
    warpdecode.hf.patch(model, strict=True)


@torch.no_grad()
def test_the_own_forward_runs_once_in_a_call_that_is_not_served():
    calls = []

    class CountedExperts(hf_outside.class_of("step3p7", "Step3p7Experts")):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            calls.append(1)
            return (1.5 if self.more else 1.0) * super().forward(hidden_states, top_k_index, top_k_weights)

    module = test_hf_outside._built("step3p7")
    module.__class__, module.more = CountedExperts, False
    warpdecode.hf.patch(module)
    module.more = True
    with pytest.warns(WarpDecodeFallbackWarning, match="on a probe"):
        module(*test_hf_outside._call("step3p7"))
    calls.clear()
    module(*test_hf_outside._call("step3p7"))
    assert len(calls) == 1
