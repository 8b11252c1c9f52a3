"""The numerics contract on CUDA, over ten shapes and all schedules. torch.equal throughout, no tolerance."""

import pytest
import torch

import warpdecode
from cases import make_layer, make_tokens, poison
from test_moe import kernels_of
from warpdecode.frameworks import _torch

pytestmark = pytest.mark.gpu

# E, K, H, I: real proportions with fewer experts, widths that are no multiple of a tile, one expert, many of them.
SHAPES = [
    (32, 8, 2048, 768),
    (24, 8, 2816, 704),
    (48, 8, 1024, 704),  # tokens as columns up to 48 routes an expert, since 48 * 704 is beyond 2^15: at T = 256
    (16, 2, 4096, 1600),
    (8, 2, 1024, 3584),
    (96, 10, 512, 256),
    (9, 3, 72, 88),
    (3, 2, 8, 8),
    (6, 3, 1032, 2056),
    (1, 1, 264, 136),
]
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 100, 256, 1000)
DTYPES = (torch.bfloat16, torch.float16)


def calls_of(layer, tokens, top_k):
    """A call by the rule, and one by each kernel that serves so many tokens in reasonable time."""
    names = [name for name in kernels_of("cuda") if name != "cuda_direct" or (tokens <= 100 and top_k <= 16)]
    return {name: warpdecode.Experts(layer.gate_up, layer.down, kernel=name) for name in [None, *names]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_batch_size(cuda, shape, dtype):
    """The first tokens of a batch of 4096, in every smaller batch and in whole, and some alone, by every schedule."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    x, ids, weights = make_tokens(layer, 4096, top_k, seed=hidden + intermediate)
    together = warpdecode.Experts(layer.gate_up, layer.down)(x, ids, weights)
    for tokens in (*TOKENS, 4096):
        part = slice(0, tokens)
        for name, call in calls_of(layer, tokens, top_k).items():
            assert torch.equal(call(x[part], ids[part], weights[part]), together[part]), (tokens, name)
    for token in (0, 63, 2047, 4095):
        one = slice(token, token + 1)
        for name, call in calls_of(layer, 1, top_k).items():
            assert torch.equal(call(x[one], ids[one], weights[one]), together[one]), (token, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [8, 64, 256, 4096])
def test_neighbours(cuda, tokens, dtype, shape):
    """A token's bits are the same behind others, beside many with its experts, beside padding, by every schedule."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    x, ids, weights = make_tokens(layer, tokens, top_k, seed=hidden + tokens)
    together = warpdecode.Experts(layer.gate_up, layer.down)(x, ids, weights)
    order = torch.randperm(tokens).to(cuda)
    real, copied = 3 * tokens // 8, tokens // 2
    other = ids.clone()
    other[real : real + copied] = ids[0]
    other[real + copied :] = -1
    alone = warpdecode.Experts(layer.gate_up, layer.down)(x[real : real + 1], ids[:1], weights[real : real + 1])
    for name, call in calls_of(layer, tokens, top_k).items():
        assert torch.equal(call(x[order], ids[order], weights[order]), together[order]), name
        found = call(x, other, weights)
        assert torch.equal(found[:real], together[:real]) and torch.equal(found[real : real + 1], alone), name
        assert not found[real + copied :].any(), name


@pytest.mark.parametrize("shape", [*SHAPES, (20, 6, 712, 328), (64, 6, 1024, 768), (8, 6, 2048, 1032)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["zipf", "one", "out of range"])
def test_skewed_routings(cuda, routing, dtype, shape):
    """Lists longer than a tile, empty lists, an expert twice in a token, ids of other processes; both kernels alone as
    well, and a token alone."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    for tokens in (5, 40, 130, 700, 2500):
        x, ids, weights = make_tokens(layer, tokens, top_k, seed=tokens, routing=routing)
        calls = calls_of(layer, tokens, top_k)
        rule = calls.pop(None)
        expected = rule(x, ids, weights)
        assert torch.equal(rule(x[-1:], ids[-1:], weights[-1:]), expected[-1:]), tokens
        valid = (ids >= 0) & (ids < experts)
        for name, call in calls.items():
            assert torch.equal(call(x, ids, weights), expected), (tokens, name)
            middle = warpdecode.moe_gate_up_3d_batched(call, x, ids)
            if name == next(iter(calls)):
                first = middle
            assert torch.equal(middle[valid], first[valid]), (tokens, name)
            assert torch.equal(warpdecode.moe_down_3d_batched(call, first, ids, weights), expected), (tokens, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("behind", [0, 16, 112])  # bytes from a multiple of 128: lines of L2 are forgotten whole
def test_what_lies_around_the_workspace(cuda, monkeypatch, shape, dtype, behind):
    """Dirty, wherever it lies, and nothing beside it is changed."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    beside, taken = 1024, []

    def workspace(size, like):
        owner = torch.full((size + 2 * beside + 128,), 0xA5, dtype=torch.uint8, device=like.device)
        first = beside + behind
        poison(owner[first : first + size])
        taken.append((owner, first, size))
        return owner.data_ptr() + first, owner

    for tokens in (1, 8, 40, 300):
        inputs = make_tokens(layer, tokens, top_k)
        calls = calls_of(layer, tokens, top_k)
        expected = calls[None](*inputs)
        for name, call in calls.items():
            with monkeypatch.context() as patched:
                patched.setattr(_torch, "workspace", workspace)
                found = [call(*inputs) for _ in range(3)]
            assert all(torch.equal(out, expected) for out in found), (tokens, name)
            assert len(taken) == 3
            while taken:
                owner, first, size = taken.pop()
                assert (owner[:first] == 0xA5).all() and (owner[first + size :] == 0xA5).all(), (tokens, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_streams_at_once(cuda, dtype, shape):
    """Calls on two streams, with a workspace each: each stream begins before the other has ended."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    inputs = [make_tokens(layer, tokens, top_k, seed=tokens) for tokens in (3, 40, 400, 1500)]
    expected = [call(*one) for one in inputs]
    streams, outputs = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in streams]
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # until all is enqueued
    for which, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            marks[which][0].record()
            for _ in range(20):
                outputs[which].append([call(*one) for one in inputs])
            marks[which][1].record()
    torch.cuda.synchronize()
    assert marks[0][0].elapsed_time(marks[1][1]) > 0 and marks[1][0].elapsed_time(marks[0][1]) > 0
    for found in (*outputs[0], *outputs[1]):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300, 1500])
def test_a_thousand_replays(cuda, monkeypatch, tokens, dtype, shape):
    """Captured once, replayed a thousand times over a poisoned output and workspace: an eager call's bits each time."""
    experts, top_k, hidden, intermediate = shape
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    inputs = make_tokens(layer, tokens, top_k)
    expected, taken = call(*inputs), []

    def workspace(size, like):
        taken.append(torch.empty(size, dtype=torch.uint8, device=like.device))
        return taken[-1].data_ptr(), taken[-1]

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patched, torch.cuda.graph(graph):
        patched.setattr(_torch, "workspace", workspace)
        out = call(*inputs)
    assert len(taken) == 1
    differing = torch.zeros((), dtype=torch.int64, device=cuda)
    for _ in range(1000):
        for memory in (out, *taken):
            poison(memory)
        graph.replay()
        differing += (out != expected).sum()
    assert differing.item() == 0
