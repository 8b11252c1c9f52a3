"""The whole layer against the FP64 reference: shapes, dtypes, routings, devices, every kernel of the table."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import warpdecode
from cases import DTYPES, MODEL_SHAPES, error_bound, exact, make_layer, make_tokens, poison, relative_error

pytestmark = pytest.mark.filterwarnings("error")


def kernels_of(device):
    """Names of the kernels of a device that this machine can run."""
    return [kernel.name for kernel in warpdecode.kernels() if kernel.device == device and kernel.usable]


def experts_of(layer, kernel):
    """The layer by one kernel of the table. Skips where its device does not serve that one."""
    device = layer.down.device.type
    if kernel not in kernels_of(device):
        pytest.skip(f"{'gpu' if device == 'cuda' else device}: this one does not serve {kernel}")
    return warpdecode.Experts(layer.gate_up, layer.down, kernel=kernel)


def run(layer, x, ids, weights, activation="silu", kernel=None):
    """A call with a poisoned output; every element must have been written."""
    out = poison(torch.empty_like(x))
    experts = warpdecode.Experts(layer.gate_up, layer.down, activation=activation, kernel=kernel)
    assert experts(x, ids, weights, out=out) is out
    assert not out.isnan().any()
    return out


def dtypes_of(device):
    """float32 is served on the CPU alone."""
    return DTYPES if device == "cpu" else DTYPES[:2]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 40])
def test_close_to_fp64(device, tokens, activation):
    for dtype in dtypes_of(device):
        layer = make_layer(12, 320, 136, dtype, device, seed=tokens)
        call = make_tokens(layer, tokens, 4, seed=tokens)
        expected = exact(layer, *call, activation)
        bound = error_bound(expected, dtype)
        for kernel in kernels_of(device):
            found = run(layer, *call, activation, kernel)
            assert relative_error(found, expected) <= bound, (dtype, kernel)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one", "out of range"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routings(device, routing, id_dtype, weight_dtype):
    for dtype in dtypes_of(device):
        layer = make_layer(9, 72, 88, dtype, device, seed=5)
        call = make_tokens(layer, 21, 3, 6, routing, id_dtype, weight_dtype)
        expected = exact(layer, *call)
        for kernel in kernels_of(device):
            found = run(layer, *call, kernel=kernel)
            assert relative_error(found, expected) <= error_bound(expected, dtype), (dtype, kernel)
            if routing == "out of range":
                assert (found[0] == 0).all()


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_model_shapes(device, name):
    _, top_k, hidden, intermediate = MODEL_SHAPES[name]
    experts = 12 if hidden * intermediate < 4 << 20 else 3  # few, because the reference is slow and memory finite
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_layer(experts, hidden, intermediate, dtype, device)
        for tokens in (1, 5):
            call = make_tokens(layer, tokens, min(top_k, experts), seed=tokens)
            expected = exact(layer, *call)
            found = run(layer, *call)
            assert relative_error(found, expected) <= error_bound(expected, dtype), dtype


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 70),
    top_k=st.integers(1, 18),
    experts=st.integers(1, 40),
    hidden=st.integers(1, 40).map(lambda n: 8 * n),
    intermediate=st.integers(1, 40).map(lambda n: 8 * n),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    routing=st.sampled_from(["uniform", "zipf", "one", "out of range"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, tokens, top_k, experts, hidden, intermediate, dtype, activation, routing, seed):
    if device == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    layer = make_layer(experts, hidden, intermediate, dtype, device, seed)
    call = make_tokens(layer, tokens, top_k, seed, routing)
    expected = exact(layer, *call, activation)
    found = run(layer, *call, activation)
    assert relative_error(found, expected) <= error_bound(expected, dtype)


@pytest.mark.gpu
def test_many_tokens_on_cuda(cuda):
    """More routes than blocks search for themselves (sorted lists), and more than one pass serves."""
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_layer(24, 264, 120, dtype, cuda)
        for tokens, routing in ((700, "uniform"), (700, "one"), (700, "out of range"), (9000, "zipf")):
            call = make_tokens(layer, tokens, 4, seed=tokens, routing=routing)
            found = run(layer, *call)
            some = torch.randint(0, tokens, (200,))  # the reference takes its time
            expected = exact(layer, *(t[some.to(t.device)] for t in call))
            error = relative_error(found[some.to(found.device)], expected)
            assert error <= error_bound(expected, dtype), (dtype, tokens, routing)


def test_no_tokens(device):
    for dtype in dtypes_of(device):
        layer = make_layer(4, 64, 32, dtype, device)
        found = warpdecode.moe(*make_tokens(layer, 0, 2), layer.gate_up, layer.down)
        assert found.shape == (0, 64)


def test_weights_changed_in_place_are_seen(device):
    layer = make_layer(4, 64, 32, torch.bfloat16, device)
    experts = warpdecode.Experts(layer.gate_up, layer.down)
    call = make_tokens(layer, 3, 2)
    before = experts(*call)
    layer.down.mul_(2)
    assert torch.equal(experts(*call), before * 2)  # a power of two: exact


def test_parts_of_the_intermediate(device):
    """gate_up then down gives forward's bits, and the intermediate has 16 significant bits and more."""
    for dtype in dtypes_of(device):
        layer = make_layer(6, 200, 104, dtype, device)
        x, ids, weights = make_tokens(layer, 7, 3)
        experts = warpdecode.Experts(layer.gate_up, layer.down)
        inter = warpdecode.moe_gate_up_3d_batched(experts, x, ids)
        assert torch.equal(warpdecode.moe_down_3d_batched(experts, inter, ids, weights), experts(x, ids, weights))
        both = torch.einsum("th,tkrh->tkr", x.double(), layer.gate_up[ids].double())
        gate, up = both.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        value = inter[:, :, 0].double()
        if dtype != torch.float32:
            assert torch.equal(inter[:, :, 0], value.to(dtype))
            value = value + inter[:, :, 1].double() * (2.0**-11 if dtype == torch.float16 else 1.0)
        # the sums' error is absolute (about 2^-22 of the sums' size), the parts' is relative: 2^-17 is 16 bits
        assert ((value - expected).abs() <= 2.0**-17 * expected.abs() + 2.0**-19).all()


def test_extreme_values(device):
    """An intermediate beyond float16, infinities and NaN stay what IEEE says, and stay in their token."""
    layer = make_layer(2, 64, 32, torch.float16, device)
    x, ids, weights = make_tokens(layer, 3, 2)
    ids[:] = torch.tensor([0, 1])
    x[1] = 60000.0
    x[2, 5] = float("nan")
    out = warpdecode.moe(x, ids, weights, layer.gate_up, layer.down)
    alone = warpdecode.moe(x[:1], ids[:1], weights[:1], layer.gate_up, layer.down)
    assert torch.equal(out[:1], alone)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()
    assert out[2].isnan().all()
