"""The numerics contract: a token's bits depend on the token alone. torch.equal throughout, no tolerance."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import warpdecode
from cases import make_layer, make_tokens, poison
from test_moe import dtypes_of, kernels_of

SHAPES = [(16, 4, 256, 128), (40, 8, 1536, 512), (9, 3, 72, 88), (12, 2, 2816, 704), (3, 2, 8, 8), (6, 3, 1032, 2056)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_batched_permuted_padded(device, shape):
    experts, top_k, hidden, intermediate = shape
    for dtype in dtypes_of(device):
        layer = make_layer(experts, hidden, intermediate, dtype, device)
        call = warpdecode.Experts(layer.gate_up, layer.down)
        x, ids, weights = make_tokens(layer, 100, top_k, seed=1)
        together = call(x, ids, weights)
        for tokens in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64):
            assert torch.equal(call(x[:tokens], ids[:tokens], weights[:tokens]), together[:tokens]), (dtype, tokens)
        for token in (0, 13, 99):
            one = slice(token, token + 1)
            assert torch.equal(call(x[one], ids[one], weights[one]), together[one]), dtype
        order = torch.randperm(100).to(x.device)
        assert torch.equal(call(x[order], ids[order], weights[order]), together[order]), dtype
        # padding rows, duplicated and skewed neighbours, rows without experts
        padded_ids = ids.clone()
        padded_ids[20:50] = ids[19]
        padded_ids[50:60] = -1
        assert torch.equal(call(x, padded_ids, weights)[:20], together[:20]), dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel(device, shape):
    """Each row of the library's table, forced on the same input."""
    experts, top_k, hidden, intermediate = shape
    for dtype in dtypes_of(device):
        layer = make_layer(experts, hidden, intermediate, dtype, device)
        for tokens in (1, 5, 40):
            call = make_tokens(layer, tokens, top_k, seed=tokens, routing="zipf")
            outputs = [warpdecode.Experts(layer.gate_up, layer.down, kernel=name)(*call) for name in kernels_of(device)]
            assert all(torch.equal(outputs[0], other) for other in outputs[1:]), (dtype, tokens)


def test_any_number_of_threads():
    layer = make_layer(12, 1536, 512, torch.bfloat16)
    call = make_tokens(layer, 9, 4)
    before = warpdecode.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3, 8):
            warpdecode.set_num_threads(count)
            outputs.append(warpdecode.moe(*call, layer.gate_up, layer.down))
    finally:
        warpdecode.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    top_k=st.integers(1, 12),
    experts=st.integers(1, 30),
    hidden=st.integers(1, 50).map(lambda n: 8 * n),
    intermediate=st.integers(1, 50).map(lambda n: 8 * n),
    routing=st.sampled_from(["uniform", "zipf", "one", "out of range"]),
    seed=st.integers(0, 2**31),
)
def test_any_token_alone(device, top_k, experts, hidden, intermediate, routing, seed):
    layer = make_layer(experts, hidden, intermediate, torch.bfloat16, device, seed)
    x, ids, weights = make_tokens(layer, 37, top_k, seed, routing)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    together = call(x, ids, weights)
    for token in (seed % 37, 36):
        one = slice(token, token + 1)
        assert torch.equal(call(x[one], ids[one], weights[one]), together[one])


@pytest.mark.gpu
def test_large_batches_on_cuda(cuda):
    """Sorted lists and several passes have decode's bits."""
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_layer(32, 512, 256, dtype, cuda)
        call = warpdecode.Experts(layer.gate_up, layer.down)
        x, ids, weights = make_tokens(layer, 40000, 4, seed=3)
        together = call(x, ids, weights)
        for tokens in (1, 64, 256, 1000, 4096):
            assert torch.equal(call(x[:tokens], ids[:tokens], weights[:tokens]), together[:tokens]), (dtype, tokens)
        assert torch.equal(call(x[39000:], ids[39000:], weights[39000:]), together[39000:])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 40, 1500])
def test_graph_replay_on_cuda(cuda, tokens):
    """Eager and captured calls, replayed often, with new inputs in the same memory."""
    layer = make_layer(32, 1024, 384, torch.bfloat16, cuda)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    x, ids, weights = make_tokens(layer, tokens, 4)
    expected = call(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, ids, weights)
    for _ in range(200):
        poison(out)
        graph.replay()
        assert torch.equal(out, expected)
    other = make_tokens(layer, tokens, 4, seed=9, routing="zipf")
    for kept, new in zip((x, ids, weights), other, strict=True):
        kept.copy_(new)
    graph.replay()
    assert torch.equal(out, call(*other))


@pytest.mark.gpu
def test_two_streams_on_cuda(cuda):
    """Calls on two streams at once, each with its own workspace, do not disturb each other."""
    layer = make_layer(64, 2048, 768, torch.bfloat16, cuda)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    inputs = [make_tokens(layer, tokens, 8, seed=tokens) for tokens in (3, 50)]
    expected = [call(*one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(call(*inputs[i]))
    torch.cuda.synchronize()
    for i, outputs in enumerate(found):
        assert all(torch.equal(out, expected[i]) for out in outputs)
