"""Layouts and lists of arrays: the bits know nothing of the layout, and what is wrong is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layouts
import warpdecode
from cases import DTYPES, error_bound, poison, relative_error
from layouts import GATES, LAYOUTS, describe, draw_parts, draw_tokens, served_without_gate, stored
from test_moe import kernels_of

pytestmark = pytest.mark.filterwarnings("error")

SHAPES = [(9, 3, 72, 88), (3, 2, 8, 8), (4, 2, 264, 136), (5, 4, 104, 328)]  # E, K, H, I


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_do_not_depend_on_the_layout(shape, bias):
    """Every layout, every kernel, all of a call and its halves."""
    experts, top_k, hidden, intermediate = shape
    for dtype in DTYPES:
        parts = draw_parts(experts, hidden, intermediate, dtype, bias_dtype=dtype if bias else None)
        for tokens in (1, 61):  # 61: more routes of an expert than are worked on at once
            x, ids, weights = draw_tokens(parts, tokens, top_k, seed=tokens)
            expected = describe(parts)(x, ids, weights)
            assert not expected.isnan().any()
            for layout in LAYOUTS:
                for kernel in kernels_of("cpu"):
                    call = describe(parts, layout, kernel)
                    out = poison(torch.empty_like(x))
                    assert torch.equal(call(x, ids, weights, out=out), expected), (dtype, layout, kernel)
                    inter = warpdecode.moe_gate_up_3d_batched(call, x, ids)
                    halves = warpdecode.moe_down_3d_batched(call, inter, ids, weights)
                    assert torch.equal(halves, expected), (dtype, layout, kernel)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if served_without_gate(layout)])
def test_the_bits_without_a_gate(layout):
    for dtype in DTYPES:
        parts = draw_parts(4, 72, 88, dtype, has_gate=False, bias_dtype=torch.float32)
        call = draw_tokens(parts, 9, 3)
        expected = describe(parts, activation="relu2")(*call)
        for kernel in kernels_of("cpu"):
            assert torch.equal(describe(parts, layout, kernel, activation="relu2")(*call), expected), (dtype, kernel)


def test_sums_below_the_subnormals():
    """Products that underflow leave a -0 in a lane, which the padding of the last group makes a +0: in every layout."""
    parts = draw_parts(2, 40, 8, torch.float32)
    parts.gate.fill_(-1e-30)
    parts.up.fill_(1.0)
    x, ids, weights = draw_tokens(parts, 4, 2)
    x.fill_(1e-30)
    ids.fill_(1)
    weights.fill_(1.0)
    expected = None
    for layout in LAYOUTS:
        for kernel in kernels_of("cpu"):
            inter = warpdecode.moe_gate_up_3d_batched(describe(parts, layout, kernel), x, ids)
            expected = inter if expected is None else expected
            assert torch.equal(inter.view(torch.int32), expected.view(torch.int32)), (layout, kernel)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 30),
    top_k=st.integers(1, 5),
    experts=st.integers(1, 9),
    hidden=st.integers(1, 20).map(lambda n: 8 * n),
    intermediate=st.integers(1, 20).map(lambda n: 8 * n),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    gate=st.sampled_from(list(GATES)),
    bias=st.sampled_from(["none", "float32", "own"]),
    weight_on_input=st.booleans(),
    routing_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_any_description(
    tokens, top_k, experts, hidden, intermediate, dtype, layout, gate, bias, weight_on_input, routing_dtype, seed
):
    properties = {**GATES[gate], "weight_on_input": weight_on_input}
    has_gate = properties.pop("has_gate", True)
    if not has_gate and not served_without_gate(layout):
        layout = "pointers"
    bias_dtype = {"none": None, "float32": torch.float32, "own": dtype}[bias]
    parts = draw_parts(experts, hidden, intermediate, dtype, seed, has_gate, bias_dtype)
    call = draw_tokens(parts, tokens, top_k, seed, routing_dtype)
    found = describe(parts, layout, **properties)(*call, out=poison(torch.empty_like(call[0])))
    expected = layouts.exact(parts, *call, layout, **properties)
    assert relative_error(found, expected) <= error_bound(expected, dtype)
    assert torch.equal(found, describe(parts, **properties)(*call))


NAMES = ("gate_up_proj", "down_proj", "up_proj", "gate_up_bias", "up_bias", "down_bias")


def arrays_of(layout):
    """A layer's arrays by name, as Parameters, and the other keywords of Experts."""
    parts = draw_parts(3, 72, 88, torch.bfloat16, bias_dtype=torch.float32)
    gate_up, down, keywords = stored(parts, layout)
    everything = {"gate_up_proj": gate_up, "down_proj": down, **keywords}
    arrays = {name: everything.pop(name) for name in NAMES}

    def parameter(array):
        return [parameter(a) for a in array] if isinstance(array, list) else torch.nn.Parameter(array)

    return parts, {name: parameter(array) for name, array in arrays.items()}, everything


@torch.no_grad()
@pytest.mark.parametrize("layout", ["separate", "pointers, separate"])
@pytest.mark.parametrize("name", NAMES)
def test_other_weights_are_seen(layout, name):
    """Changed in place, and given other memory (`.data = ...`), each of the arrays, of a list the last member."""
    parts, arrays, keywords = arrays_of(layout)
    call = draw_tokens(parts, 7, 2)
    experts = warpdecode.Experts(**arrays, **keywords)
    seen = [experts(*call)]
    tensor = arrays[name][-1] if isinstance(arrays[name], list) else arrays[name]
    tensor.mul_(-2)
    seen.append(experts(*call))
    tensor.data = tensor.data * 3
    seen.append(experts(*call))
    assert torch.equal(seen[-1], warpdecode.Experts(**arrays, **keywords)(*call))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert experts.matches(**arrays)
    other = {**arrays, name: [t.clone() for t in arrays[name]] if isinstance(arrays[name], list) else tensor.clone()}
    assert not experts.matches(**other)
    if name not in ("gate_up_proj", "down_proj"):
        assert not experts.matches(**{**arrays, name: None})
    tensor.data = tensor.data[..., :8].contiguous()
    with pytest.raises(ValueError, match=r"shape was \["):
        experts(*call)


def test_lists_of_other_frameworks():
    parts = draw_parts(3, 72, 88, torch.float32)
    x, ids, weights = draw_tokens(parts, 4, 2)
    expected = describe(parts)(x, ids, weights).numpy()
    gate_up, down, _ = stored(parts, "pointers")
    arrays = [[member.numpy() for member in members] for members in (gate_up, down)]
    call = [t.numpy() for t in (x, ids.int(), weights)]
    assert np.array_equal(warpdecode.moe(*call, *arrays), expected)
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    arrays = [[jax.device_put(member, cpu) for member in members] for members in arrays]
    found = warpdecode.moe(*(jax.device_put(array, cpu) for array in call), *arrays)
    assert np.array_equal(np.asarray(found), expected)


def test_refused_lists():
    parts = draw_parts(3, 72, 88, torch.bfloat16)
    gate_up, down, _ = stored(parts, "pointers")
    odd = gate_up[2]
    refusals = [
        (odd[:8].clone(), r"gate_up_proj\[2\]: shape was \[8, 72\], expected \[176, 72\] as gate_up_proj\[0\]"),
        (odd.float(), r"gate_up_proj\[2\]: dtype was float32, expected bfloat16 as gate_up_proj\[0\]"),
        (odd.t().contiguous().t(), r"gate_up_proj\[2\]: strides were \[1, 176\], expected compact row-major ones"),
        (odd.float().numpy(), r"gate_up_proj\[2\]: was a <class 'numpy.ndarray'>, expected a <class 'torch.Tensor'>"),
    ]
    for member, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            warpdecode.Experts([*gate_up[:2], member], down)
    odd_address = np.zeros(4 * odd.numel() + 1, np.uint8)[1:].view(np.float32).reshape(odd.shape)
    aligned = [member.float().numpy() for member in gate_up[:2]]
    with pytest.raises(
        ValueError, match=r"gate_up_proj\[2\]: data was 1 bytes past a multiple of 4, expected an address"
    ):
        warpdecode.Experts([*aligned, odd_address], [member.float().numpy() for member in down])
    with pytest.raises(ValueError, match="gate_up_proj: was empty, expected an array for each expert"):
        warpdecode.Experts([], down)
    with pytest.raises(ValueError, match=r"down_pointers: shape was \[2\], expected \[E\] = \[3\]"):
        warpdecode.Experts(gate_up, down[:2])
    with pytest.raises(ValueError, match=r"gate_up_proj: had 3 axes, expected 2: \[2I, H\]"):
        warpdecode.Experts([member[None] for member in gate_up], down)
    trained = [torch.nn.Parameter(member) for member in gate_up]
    x, ids, weights = draw_tokens(parts, 2, 2)
    with pytest.raises(ValueError, match=r"gate_up_proj\[0\]: requires a gradient"):
        warpdecode.moe(x, ids, weights, trained, down)


def test_refusals():
    parts = draw_parts(3, 72, 88, torch.bfloat16, bias_dtype=torch.float32)
    gate_up, down, _ = stored(parts)
    bias, down_bias = torch.cat([parts.gate_bias, parts.up_bias], 1), parts.down_bias
    refusals = [
        ({"activation": "tanh"}, "activation: was 'tanh', expected one of 'silu', 'gelu_tanh', 'gelu', 'relu'"),
        ({"is_transposed": 1}, "is_transposed: was 1, expected one of False, True, 'down'"),
        ({"is_interleaved": None}, "is_interleaved: was None, expected one of False, True"),
        ({"limit": 0.0}, "limit: was 0.0, expected a float32 number above 0, or None for none"),
        ({"limit": -1.0}, "limit: was -1.0, expected a float32 number above 0, or None for none"),
        ({"limit": float("nan")}, "limit: was nan, expected a float32 number above 0"),
        ({"limit": 1e-46}, "limit: was 1e-46, expected a float32 number above 0"),  # 0 there, which would be no limit
        ({"limit": 0.5, "has_gate": False}, "limit: was 0.5, expected None with has_gate=False"),
        ({"alpha": 0}, "alpha: was 0, expected a finite float32 number above 0, or None for 1"),
        ({"alpha": float("inf")}, "alpha: was inf, expected a finite float32 number above 0"),
        ({"alpha": 1e39}, r"alpha: was 1e\+39, expected a finite float32 number above 0"),
        ({"alpha": 1e-46}, "alpha: was 1e-46, expected a finite float32 number above 0"),
        ({"up_offset": 10**400}, "up_offset: was 10000.*, expected a finite float32 number"),
        ({"alpha": 2.0, "activation": "gelu"}, "alpha: was 2.0, expected None with activation 'gelu'"),
        ({"up_offset": float("nan")}, "up_offset: was nan, expected a finite float32 number"),
        ({"limit": "7"}, "limit: was '7', expected a float32 number above 0, or None for none"),
        ({"alpha": [1]}, r"alpha: was \[1\], expected a finite float32 number above 0"),
        ({"up_offset": None}, "up_offset: was None, expected a finite float32 number"),
        ({"kernel": 5}, "kernel: was 5, expected None or one of cuda_direct, "),
        ({"kernel": "fast"}, "kernel: was 'fast', expected None or one of cuda_direct, "),
        ({"is_transposed": True}, "gate_up_proj: 2I was 72 columns, expected twice a multiple of 8 from 8 to 16777216"),
        ({"is_transposed": "down"}, r"down_proj: shape was \[3, 72, 88\], expected \[E, I, H\] = \[3, 88, 72\]"),
        ({"has_gate": False}, r"down_proj: shape was \[3, 72, 88\], expected \[E, H, I\] = \[3, 72, 176\]"),
        ({"has_gate": False, "up_offset": 1.0}, "experts: up_offset was 1, expected 0 with has_gate=False"),
        ({"has_gate": False, "is_interleaved": True}, "experts: is_interleaved was 1, expected 0 with has_gate=False"),
        ({"has_gate": False, "up_proj": parts.up}, "up_proj: was given, expected None with has_gate=False"),
        ({"up_proj": parts.up, "is_interleaved": True}, "experts: is_interleaved was 1, expected 0 with up_proj"),
        ({"up_proj": parts.up}, r"down_proj: shape was \[3, 72, 88\], expected \[E, H, I\] = \[3, 72, 176\]"),
        ({"up_bias": parts.up_bias}, "up_bias: was given, expected None without up_proj"),
        ({"gate_up_bias": bias[:, :88]}, r"gate_up_bias: shape was \[3, 88\], expected \[E, 2I\] = \[3, 176\]"),
        ({"gate_up_bias": bias.half()}, "gate_up_bias: dtype was float16, expected bfloat16 or float32"),
        ({"down_bias": down_bias[0]}, r"down_bias: had 1 axes, expected 2: \[E, H\]"),
        ({"down_bias": down_bias.t().contiguous().t()}, "down_bias: strides were"),
    ]
    for properties, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            warpdecode.Experts(gate_up, down, **properties)
    turned = [weights.transpose(1, 2).contiguous() for weights in (gate_up, down)]
    for arrays, value in ((turned, "True"), ((gate_up, turned[1]), "'down'")):
        with pytest.raises(ValueError, match=rf"\(with is_transposed={value} these shapes fit\)"):
            warpdecode.Experts(*arrays)
    with pytest.raises(ValueError, match=r"gate_up_proj: was a torch.*ParameterList, .* for weights a list of them"):
        warpdecode.Experts(torch.nn.ParameterList(list(gate_up)), down)
    with pytest.raises(ValueError, match=r"gate_up_proj: dtype was torch.float8_e4m3fn, expected bfloat16"):
        warpdecode.Experts(gate_up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="gate_up_proj: I was 84 rows, expected a multiple of 8 from 8 to 16777216"):
        warpdecode.Experts(parts.gate[:, :84].contiguous(), down, has_gate=False)
    parts.gate_bias.requires_grad_()
    with pytest.raises(ValueError, match="gate_up_bias: requires a gradient"):
        describe(parts)(*draw_tokens(parts, 2, 2))


def test_an_output_in_the_memory_of_one_expert():
    """Of stacked weights the C library sees that; of a list, where each array is."""
    parts = draw_parts(3, 72, 88, torch.bfloat16, bias_dtype=torch.bfloat16)
    experts = describe(parts, "pointers, separate")
    x, ids, weights = draw_tokens(parts, 4, 2)
    intermediate = warpdecode.moe_gate_up_3d_batched(experts, x, ids)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        member = experts._arrays[name][2]
        before, out = member.clone(), member.view(-1)[-4 * 72 :].view(4, 72)
        for call in (
            lambda out=out: experts(x, ids, weights, out=out),
            lambda out=out: warpdecode.moe_down_3d_batched(experts, intermediate, ids, weights, out=out),
        ):
            with pytest.raises(ValueError, match=rf"out: overlaps {name}\[2\] in memory, expected memory of its own"):
                call()
        assert torch.equal(member, before)
    gate_up, down, _ = stored(parts, "pointers")
    memory = torch.cat([down[0].flatten(), torch.empty(4 * 72, dtype=torch.bfloat16), down[1].flatten()])
    between = memory[72 * 88 :][: 4 * 72].view(4, 72)  # what only touches them is served
    down = [memory[: 72 * 88].view(72, 88), memory[-72 * 88 :].view(72, 88), down[2]]
    experts = warpdecode.Experts(gate_up, down)
    assert torch.equal(experts(x, ids, weights, out=between), experts(x, ids, weights))


def test_a_negated_view_is_refused():
    """torch marks such a view and leaves the memory's signs as they are."""
    parts = draw_parts(3, 72, 88, torch.bfloat16)
    gate_up, down, _ = stored(parts)
    call = draw_tokens(parts, 4, 2)
    experts = warpdecode.Experts(gate_up, down)
    expected = experts(*call)
    for i, name in ((0, "hidden_states"), (2, "topk_weights")):
        negated = [torch._neg_view(array) if i == j else array for j, array in enumerate(call)]
        with pytest.raises(ValueError, match=f"{name}: was a negated view, expected .*resolve_neg"):
            experts(*negated)
    with pytest.raises(ValueError, match="down_proj: was a negated view"):
        warpdecode.Experts(gate_up, torch._neg_view(down))
    assert torch.equal(experts(*call), expected)
