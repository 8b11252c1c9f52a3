"""What torch does around a call: autograd and its transforms, tracing and torch.compile."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import warpdecode
from cases import make_layer, make_tokens


@pytest.fixture
def layer():
    return make_layer(8, 64, 32, torch.float32)


@pytest.fixture
def call(layer):
    """(experts, hidden_states, topk_ids, topk_weights)"""
    return warpdecode.Experts(layer.gate_up, layer.down), *make_tokens(layer, 3, 2)


@pytest.mark.parametrize("whole", [False, True], ids=["Experts", "moe"])
def test_torch_compile_breaks_its_graph_and_goes_on(layer, call, whole):
    experts, x, ids, weights = call

    def run(x):
        doubled = x * 2
        if whole:
            return warpdecode.moe(doubled, ids, weights, layer.gate_up, layer.down) + 1
        return experts(doubled, ids, weights) + 1

    compiled = torch.compile(run, backend="eager")
    found = [compiled(x), compiled(x)]  # the first describes the tensors, the second has them described
    assert torch.equal(found[0], run(x)) and torch.equal(found[1], run(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", ["all", "gate_up", "down"])
def test_autograd_sees_that_out_was_written(call, kernel):
    experts, x, ids, weights = call
    with torch.no_grad():
        inter = warpdecode.moe_gate_up_3d_batched(experts, x, ids)
    leaf = torch.ones_like(inter if kernel == "gate_up" else x).requires_grad_()
    out = leaf * 2
    squared = out**2  # its derivative needs `out` as it was
    with torch.no_grad():
        if kernel == "all":
            experts(x, ids, weights, out=out)
        elif kernel == "gate_up":
            warpdecode.moe_gate_up_3d_batched(experts, x, ids, out=out)
        else:
            warpdecode.moe_down_3d_batched(experts, inter, ids, weights, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_out_that_requires_a_gradient_is_refused(call):
    experts, x, ids, weights = call
    leaf = torch.ones_like(x).requires_grad_()
    for out in (leaf, leaf * 2):
        with pytest.raises(ValueError, match="out: requires a gradient, which these kernels do not compute"):
            experts(x, ids, weights, out=out)
        with pytest.raises(ValueError, match="out: requires a gradient"):
            warpdecode.moe_down_3d_batched(experts, torch.zeros(3, 2, 1, 32), ids, weights, out=out)
    with torch.no_grad():
        assert torch.equal(experts(x, ids, weights, out=leaf), experts(x, ids, weights))
    with torch.inference_mode():  # its tensors have no version
        assert torch.equal(experts(x, ids, weights, out=torch.empty_like(x)), leaf)


def test_a_tangent_is_refused(layer, call):
    experts, x, ids, weights = call
    expected = experts(x, ids, weights)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, torch.ones_like(t)) for name, t in (("x", x), ("w", weights))}
        assert torch.equal(experts(x, ids, weights), expected)  # no tangent is lost here
        with torch.no_grad(), pytest.raises(ValueError, match="hidden_states: has a tangent of forward-mode"):
            experts(dual["x"], ids, weights)
        with pytest.raises(ValueError, match="topk_weights: has a tangent"):
            experts(x, ids, dual["w"])
        with pytest.raises(ValueError, match="out: has a tangent"):
            experts(x, ids, weights, out=forward_ad.make_dual(torch.empty_like(x), x))
        moving = forward_ad.make_dual(layer.down, layer.down)
        with pytest.raises(ValueError, match="down_proj: has a tangent"):
            warpdecode.moe(x, ids, weights, layer.gate_up, moving)


def test_transforms_are_refused_by_name(call):
    experts, x, ids, weights = call
    for calls in range(2):  # the second finds a frame that has described such a shape before
        with pytest.raises(ValueError, match="hidden_states: has no memory of its own"):
            torch.vmap(lambda x: experts(x, ids, weights))(x[None])
        assert experts(x, ids, weights).isfinite().all(), calls
    with pytest.raises(ValueError, match="hidden_states: requires a gradient"):
        torch.func.grad(lambda x: experts(x, ids, weights).sum())(x)
    with pytest.raises(ValueError, match="hidden_states: has a tangent"):
        torch.func.jvp(lambda x: experts(x, ids, weights), (x,), (x,))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_tracing_is_refused(call):
    """Both would record the memory of the output and nothing that fills it."""
    experts, x, ids, weights = call
    with pytest.raises(ValueError, match=r"hidden_states: came while torch.jit.trace or make_fx traces the call"):
        make_fx(lambda x: experts(x, ids, weights))(x)
    with pytest.raises(ValueError, match=r"hidden_states: came while torch.jit.trace or make_fx traces the call"):
        torch.jit.trace(lambda x: experts(x, ids, weights), (x,))
    with pytest.raises(ValueError, match=r"hidden_states: came while"):
        make_fx(lambda x: warpdecode.moe_gate_up_3d_batched(experts, x, ids))(x)
