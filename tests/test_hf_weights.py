"""The weights of a patched model are those it has now, and are not kept alive; and what a call makes of its inputs."""

import copy
import gc
import weakref

import pytest
import torch

import hf_models
import warpdecode.hf


def _model(implementation: str = "eager") -> torch.nn.Module:
    return hf_models.build("qwen3_moe", implementation=implementation)


def _layer(model: torch.nn.Module) -> torch.nn.Module:
    return hf_models.experts_modules(model)[0]


def _served(model: torch.nn.Module) -> int:
    """How many layers of the model the library serves in one forward."""
    with torch.no_grad(), hf_models.counted_kernel_calls() as served:
        model(hf_models.prompt())
    return len(served)


@torch.no_grad()
def _assert_current(model: torch.nn.Module) -> None:
    """The patched model's first layer computes with the weights it has now."""
    layer = _layer(model)
    inputs = hf_models.layer_inputs(dtype=layer.down_proj.dtype)
    with hf_models.counted_kernel_calls() as served:
        got = layer(*inputs)
    assert served == [inputs[0].shape[0]]
    fresh = copy.deepcopy(layer)
    warpdecode.hf.unpatch(fresh)
    expected = fresh.double()(inputs[0].double(), inputs[1], inputs[2].double())
    scale = expected.abs().max()
    assert scale > 0.1
    # One rounding to the dtype, and FP32 sums.
    assert (got - expected).abs().max() <= scale * (torch.finfo(got.dtype).eps + 1e-5)


@torch.no_grad()
def test_weights_changed_in_any_way_are_seen_by_the_next_call():
    model = warpdecode.hf.patch(_model())
    layer = _layer(model)
    _assert_current(model)
    layer.down_proj.mul_(-2)  # in place: an optimiser, a weight sync
    _assert_current(model)
    layer.gate_up_proj.data = layer.gate_up_proj.data.flip(0)  # the storage: a merge, .to()
    _assert_current(model)
    layer.down_proj = torch.nn.Parameter(torch.randn_like(layer.down_proj))  # the parameter
    _assert_current(model)
    layer.load_state_dict({k: v.roll(1, 0) for k, v in layer.state_dict().items()}, assign=True)
    _assert_current(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        _assert_current(model)
    layer.gate_up_proj.data, layer.down_proj.data = layer.gate_up_proj.data[:4], layer.down_proj.data[:4]
    layer.num_experts = 4
    with hf_models.counted_kernel_calls() as served:
        hidden, _, weights = hf_models.layer_inputs()
        got = layer(hidden, torch.full((5, 2), 6), weights)  # an expert that is no longer there
    assert served and not got.any()


@torch.no_grad()
def test_a_new_activation_is_seen_by_the_next_call():
    model = warpdecode.hf.patch(_model())
    _assert_current(model)
    _layer(model).act_fn = torch.nn.GELU(approximate="tanh")
    _assert_current(model)


@torch.no_grad()
def test_a_new_activation_that_is_a_function_is_seen_by_the_next_call():
    model = warpdecode.hf.patch(_model())
    for function in (torch.nn.functional.silu, torch.nn.functional.relu, torch.nn.functional.gelu):
        for layer in hf_models.experts_modules(model):
            layer._modules.pop("act_fn", None)
            layer.act_fn = function
        _assert_current(model)


class _LowRank(torch.nn.Module):
    """What PEFT registers for target_parameters: the weight plus a low-rank product, computed on access."""

    def __init__(self, experts, rows, columns):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(experts, rows, 2))
        self.b = torch.nn.Parameter(torch.randn(experts, 2, columns) / columns**0.5)

    def forward(self, weight):
        return weight + self.a @ self.b


@torch.no_grad()
def test_weights_computed_on_access_are_served_and_not_held():
    model = warpdecode.hf.patch(_model())
    layer = _layer(model)
    plain = layer(*hf_models.layer_inputs())
    torch.nn.utils.parametrize.register_parametrization(layer, "down_proj", _LowRank(*layer.down_proj.shape))
    _assert_current(model)
    with hf_models.counted_kernel_calls() as served:
        assert not torch.allclose(layer(*hf_models.layer_inputs()), plain)
    assert served
    assert layer.__dict__["_warpdecode_layer"].experts is None


@pytest.mark.parametrize("how", ["patched", "by name"])
def test_nothing_of_ours_keeps_a_deleted_model_s_weights_alive(how):
    warpdecode.hf.register()
    layer = copy.deepcopy(_layer(_model(implementation="warp_decode" if how == "by name" else "eager")))
    if how == "patched":
        warpdecode.hf.patch(layer)
    with torch.no_grad(), hf_models.counted_kernel_calls() as served:
        layer(*hf_models.layer_inputs())
    assert served
    weights = weakref.ref(layer.down_proj)
    gc.collect()
    gc.disable()  # so that a cycle through the module would keep it
    try:
        del layer
        assert weights() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_memory_of_weights_that_moved_away_is_free_at_once():
    # model.to("cpu") after a rollout must empty the GPU for the trainer, not wait for the next rollout.
    layer = _layer(warpdecode.hf.patch(_model()))
    array = layer.down_proj.data.numpy().copy()
    owner = weakref.ref(array)
    layer.down_proj.data = torch.from_numpy(array)
    del array
    layer(*hf_models.layer_inputs())
    layer.down_proj.data = layer.down_proj.data.clone()
    assert owner() is None


@torch.no_grad()
def test_a_call_returns_a_fresh_tensor_and_changes_no_input():
    layer = _layer(warpdecode.hf.patch(_model()))
    inputs = hf_models.layer_inputs()
    before = [t.clone() for t in inputs]
    first, second = layer(*inputs), layer(*inputs)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    first.zero_()  # expert parallelism reduces in place
    assert second.any()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert layer(*hf_models.layer_inputs(0)).shape == (0, hf_models.HIDDEN)


@torch.no_grad()
def test_inputs_that_are_views_are_served():
    layer = _layer(warpdecode.hf.patch(_model()))
    hidden, ids, weights = hf_models.layer_inputs()
    expected = layer(hidden, ids, weights)
    views = hidden.repeat(1, 2)[:, : hf_models.HIDDEN], ids.t().contiguous().t(), weights.repeat(1, 3)[:, :2]
    assert not any(v.is_contiguous() for v in views)
    misaligned = torch.empty(hidden.numel() + 1)[1:].view_as(hidden).copy_(hidden)
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        assert torch.equal(layer(*views), expected)
        assert torch.equal(layer(misaligned, ids, weights), expected)
    assert len(served) == 2
    with pytest.raises(ValueError, match="hidden_states"):  # no layout: it is told, not handed over
        layer(torch.randn(5, hf_models.HIDDEN - 8), ids, weights)


@torch.no_grad()
def test_expert_parallelism_s_mark_for_other_ranks_contributes_nothing():
    layer = _layer(warpdecode.hf.patch(_model()))
    hidden, ids, weights = hf_models.layer_inputs()
    expected = layer(hidden, ids[:, :1].contiguous(), weights[:, :1].contiguous())
    ids[:, 1], weights[:, 1] = hf_models.EXPERTS, float("nan")
    assert torch.equal(layer(hidden, ids, weights), expected)


def test_train_mode_without_gradients_is_served():
    # TRL generates and scores in train mode under no_grad.
    model = warpdecode.hf.patch(_model().train(), strict=True)
    assert _served(model) == hf_models.MOE_LAYERS
    model.requires_grad_(False)
    model(hf_models.prompt())  # grad mode is on, and nothing requires it
    with torch.inference_mode():
        model(hf_models.prompt())
