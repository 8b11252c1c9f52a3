"""Layouts, biases and gates on CUDA: the bits know nothing of the layout or the schedule, the values are FP64's."""

import pytest
import torch

import layouts
import warpdecode
from cases import error_bound, poison, relative_error
from layouts import GATES, LAYOUTS, describe, draw_parts, draw_tokens, served_without_gate
from test_moe import kernels_of

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
# E, K, H, I: no multiples of a tile, one piece alone, more rows than a block has, wide enough for full rings
SHAPES = [(9, 3, 72, 88), (3, 2, 8, 8), (4, 2, 264, 136), (6, 4, 1160, 616)]


def kernels_for(layout):
    """The schedules that serve a layout, and None: the one that is chosen. cuda_tiled needs rows in one piece."""
    tiled = "pointers" not in layout and "transposed" not in layout
    return [None, *(name for name in kernels_of("cuda") if tiled or name != "cuda_tiled")]


def on_cuda(call):
    return [tensor.cuda() for tensor in call]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_the_layout(cuda, dtype, shape, bias):
    """Every layout, every schedule; few tokens, more than a tile of them, more routes than a block looks for."""
    experts, top_k, hidden, intermediate = shape
    parts = draw_parts(experts, hidden, intermediate, dtype, bias_dtype=dtype if bias else None).to(cuda)
    for tokens in (1, 5, 61, 700):
        x, ids, weights = on_cuda(draw_tokens(parts, tokens, top_k, seed=tokens))
        expected = describe(parts)(x, ids, weights)
        assert not expected.isnan().any()
        for layout in LAYOUTS:
            for kernel in kernels_for(layout):
                call = describe(parts, layout, kernel)
                found = call(x, ids, weights, out=poison(torch.empty_like(x)))
                assert torch.equal(found, expected), (tokens, layout, kernel)
                inter = warpdecode.moe_gate_up_3d_batched(call, x, ids)
                assert torch.equal(warpdecode.moe_down_3d_batched(call, inter, ids, weights), expected), (
                    layout,
                    kernel,
                )


@pytest.mark.parametrize("weight_on_input", [False, True], ids=["", "weight on input"])
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_close_to_fp64(cuda, gate, weight_on_input):
    properties = {**GATES[gate], "weight_on_input": weight_on_input}
    has_gate = properties.pop("has_gate", True)
    for dtype in DTYPES:
        for bias_dtype in (None, torch.float32, dtype):
            parts = draw_parts(5, 232, 168, dtype, has_gate=has_gate, bias_dtype=bias_dtype)
            for tokens in (2, 90):
                call = draw_tokens(parts, tokens, 3, seed=tokens, routing_dtype=torch.bfloat16)
                expected = layouts.exact(parts, *call, **properties)
                outputs = [
                    describe(parts.to(cuda), layout, kernel, **properties)(*on_cuda(call))
                    for layout in LAYOUTS
                    if has_gate or served_without_gate(layout)
                    for kernel in kernels_for(layout)
                ]
                assert relative_error(outputs[0].cpu(), expected) <= error_bound(expected, dtype), (dtype, bias_dtype)
                assert all(torch.equal(outputs[0], other) for other in outputs[1:]), (dtype, bias_dtype, tokens)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [30, 90, 180])
@pytest.mark.parametrize(("hidden", "intermediate"), [(72, 3464), (4360, 72)])
def test_gates_of_items_of_two_units(cuda, hidden, intermediate, tokens, gate):
    """More units than multiprocessors: a warpgroup of tiled multiplies one; in the shapes above both do."""
    properties = {**GATES[gate], "weight_on_input": tokens == 90}
    has_gate = properties.pop("has_gate", True)
    parts = draw_parts(5, hidden, intermediate, torch.bfloat16, has_gate=has_gate, bias_dtype=torch.float32)
    call = draw_tokens(parts, tokens, 3, seed=tokens)
    expected = layouts.exact(parts, *call, **properties)
    kernels = [kernel for kernel in kernels_for("standard") if kernel != "cuda_direct"]
    parts = parts.to(cuda)
    outputs = [describe(parts, "standard", kernel, **properties)(*on_cuda(call)) for kernel in kernels]
    assert relative_error(outputs[0].cpu(), expected) <= error_bound(expected, torch.bfloat16)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("layout", ["standard", "transposed"])
def test_sixteen_slots(cuda, layout):
    """The most that direct has: its rings must fit into a block's shared memory, those of long lines too."""
    parts = draw_parts(17, 2048, 200, torch.bfloat16).to(cuda)
    call = on_cuda(draw_tokens(parts, 1, 16))
    direct, grouped = (describe(parts, layout, kernel)(*call) for kernel in ("cuda_direct", "cuda_grouped"))
    assert torch.equal(direct, grouped)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nine_slots_and_two_tokens(cuda, layout):
    """What direct asks for comes within bytes of what a block can have where weights are transposed."""
    parts = draw_parts(9, 4352, 64, torch.bfloat16).to(cuda)
    call = on_cuda(draw_tokens(parts, 2, 9))
    direct, grouped = (describe(parts, layout, kernel)(*call) for kernel in ("cuda_direct", "cuda_grouped"))
    assert torch.equal(direct, grouped)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_weights_are_seen(cuda, layout):
    """Weights may change in place after every call, and a graph that was captured before sees them."""
    parts = draw_parts(8, 136, 72, torch.bfloat16, bias_dtype=torch.float32).to(cuda)
    experts = describe(parts, layout)
    x, ids, weights = on_cuda(draw_tokens(parts, 3, 2))
    first = experts(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, ids, weights)
    down = experts.down_proj
    for tensor in [down] if isinstance(down, torch.Tensor) else down:
        tensor.mul_(-2)
    graph.replay()
    again = experts(x, ids, weights)
    assert torch.equal(out, again) and not torch.equal(first, again)


@pytest.mark.parametrize(("layout", "what"), [("pointers", "at addresses of their own"), ("transposed", "transposed")])
def test_tiled_says_what_it_does_not_serve(cuda, layout, what):
    parts = draw_parts(3, 72, 88, torch.bfloat16).to(cuda)
    with pytest.raises(ValueError, match=f'kernel was "cuda_tiled".*does not serve.*{what}'):
        describe(parts, layout, "cuda_tiled")(*on_cuda(draw_tokens(parts, 3, 2)))
