"""Activations, limits, biases and routing weights on the input: the values are the reference's."""

import pytest
import torch

import layouts
import warpdecode
from cases import DTYPES, error_bound, relative_error
from layouts import GATES, LAYOUTS, describe, draw_parts, draw_tokens
from test_moe import kernels_of

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_close_to_fp64(gate):
    properties = dict(GATES[gate])
    has_gate = properties.pop("has_gate", True)
    for dtype in DTYPES:
        for bias_dtype in (None, torch.float32, dtype):
            parts = draw_parts(5, 104, 72, dtype, has_gate=has_gate, bias_dtype=bias_dtype)
            call = draw_tokens(parts, 11, 3)
            expected = layouts.exact(parts, *call, **properties)
            outputs = [describe(parts, kernel=kernel, **properties)(*call) for kernel in kernels_of("cpu")]
            assert relative_error(outputs[0], expected) <= error_bound(expected, dtype), (dtype, bias_dtype)
            assert all(torch.equal(outputs[0], other) for other in outputs[1:]), (dtype, bias_dtype)


def intermediate_of(gates, up, **properties):
    """The intermediate's values for given gates (float32) and one up, exactly what goes into the activation."""
    experts = 1
    gate_up = torch.zeros(experts, 8, 8)
    gate_up[:, :, 0] = 1.0
    up_proj = None if up is None else torch.zeros(experts, 8, 8)
    if up is not None:
        up_proj[:, :, 1] = 1.0
    x = torch.zeros(len(gates), 8)
    x[:, 0] = gates
    x[:, 1] = 0.0 if up is None else up
    call = warpdecode.Experts(
        gate_up, torch.zeros(experts, 8, 8), up_proj=up_proj, has_gate=up is not None, **properties
    )
    return warpdecode.moe_gate_up_3d_batched(call, x, torch.zeros(len(gates), 1, dtype=torch.int32))[:, 0, 0, 0]


# Units of 2^-24 that the activation may be wrong by: gelu's is derived in src/activation.h. silu's exp has 2.2, its sum
# and quotient 2; alpha's product 1, which exp multiplies by |alpha g|, at most 34 here.
@pytest.mark.parametrize(
    ("properties", "units"),
    [({"activation": "gelu"}, 16), ({}, 5), ({"alpha": 1.702}, 39), ({"activation": "relu"}, 0)],
    ids=str,
)
def test_activations_alone(properties, units):
    gates = torch.cat([torch.linspace(-12, 20, 40001), torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30])])
    found = intermediate_of(gates, None, **properties).double()
    g = gates.double()
    if "alpha" in properties:
        alpha = float(torch.tensor(properties["alpha"]))  # as float32 has it
        expected = g * torch.sigmoid(alpha * g)
    else:
        functions = {"gelu": lambda g: 0.5 * g * torch.erfc(-g / 2**0.5), "relu": torch.relu}
        expected = functions.get(properties.get("activation"), lambda g: g * torch.sigmoid(g))(g)
    assert ((found - expected).abs() <= units * 2.0**-24 * expected.abs() + 2.0**-149).all()


def test_limits_and_special_values():
    nan, infinity = float("nan"), float("inf")
    gates = torch.tensor([-3e38, -9.0, 2.0, 9.0, 3e38, nan])
    silu = torch.nn.functional.silu
    for up in (-9.0, 3.0, 9.0):
        found = intermediate_of(gates, up, limit=7.0)
        expected = silu(gates.clamp(max=7.0)) * max(min(up, 7.0), -7.0)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0, equal_nan=True)
        after = intermediate_of(gates, up, limit=7.0, clamp_after_activation=True)
        expected = silu(gates).clamp(max=7.0) * max(min(up, 7.0), -7.0)
        assert torch.allclose(after, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert intermediate_of(gates, nan, limit=7.0).isnan().all()
    unlimited = intermediate_of(gates, 0.5)
    assert torch.equal(intermediate_of(gates, 0.5, limit=infinity)[:5], unlimited[:5])
    alone = torch.tensor([-infinity, infinity, nan])
    for name in ("gelu", "relu", "relu2"):
        found = intermediate_of(alone, None, activation=name)
        assert found[0] == 0 and found[1] == infinity and found[2].isnan(), name


def test_a_zero_keeps_its_sign():
    """An up whose every product underflows is -0; no offset and no limit leave it one."""
    parts = draw_parts(1, 32, 8, torch.float32)
    parts.gate.fill_(1.0)
    parts.up.fill_(-1e-30)
    x = torch.full((1, 32), 1e-30)
    for layout in LAYOUTS:
        for kernel in kernels_of("cpu"):
            inter = warpdecode.moe_gate_up_3d_batched(describe(parts, layout, kernel), x, torch.zeros(1, 1).int())
            assert (inter == 0).all() and inter.signbit().all(), (layout, kernel)


def test_the_down_bias_comes_before_the_routing_weight():
    parts = draw_parts(3, 16, 8, torch.float32, bias_dtype=torch.float32)
    parts.down.zero_()
    x, ids, weights = draw_tokens(parts, 5, 1)
    ids[:, 0] = torch.tensor([0, 1, 2, -1, 3])
    weights = torch.rand(5, 1)
    expected = torch.zeros(5, 16)
    expected[:3] = weights[:3] * parts.down_bias
    assert torch.equal(describe(parts)(x, ids, weights), expected)


def test_weight_on_input():
    """Powers of two scale exactly: the same bits as scaled hidden states and weights of one."""
    for dtype in DTYPES:
        parts = draw_parts(4, 72, 88, dtype)
        x, ids, _ = draw_tokens(parts, 9, 1)
        half = torch.full((9, 1), 0.5)
        for layout in LAYOUTS:
            found = describe(parts, layout, weight_on_input=True)(x, ids, half)
            assert torch.equal(found, describe(parts)(x * 0.5, ids, torch.ones(9, 1))), (dtype, layout)


def test_weight_on_input_is_for_the_whole_layer():
    parts = draw_parts(4, 72, 88, torch.bfloat16)
    x, ids, weights = draw_tokens(parts, 3, 2)
    call = describe(parts, weight_on_input=True)
    sentence = "experts: weight_on_input was 1, expected 0 where one kernel runs alone: call the Experts"
    with pytest.raises(ValueError, match=sentence):
        warpdecode.moe_gate_up_3d_batched(call, x, ids)
    inter = warpdecode.moe_gate_up_3d_batched(describe(parts), x, ids)
    with pytest.raises(ValueError, match=sentence):
        warpdecode.moe_down_3d_batched(call, inter, ids, weights)
