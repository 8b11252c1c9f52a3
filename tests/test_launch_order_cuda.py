"""A call's first kernel may begin before the work ahead of it has ended, but looks at nothing before it has."""

import pytest
import torch

import warpdecode
from cases import make_layer, make_tokens, poison
from test_moe import experts_of

pytestmark = pytest.mark.gpu

KERNELS = ["cuda_direct", "cuda_grouped", "cuda_tiled"]
TOKENS = [1, 8, 100]  # all blocks of direct at once; grouped with a search in each block, and with lists


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("written", ["hidden_states", "gate_up", "down", "topk_ids"])
def test_behind_a_kernel_that_lets_others_in(cuda, kernel, tokens, written):
    """gate_up of another layer writes what the call reads, and allows the next grid long before its end.

    Fewer routes than experts up to 8 tokens, and so many neurons that grouped's down waits by expert (flags.cuh).
    """
    before = make_layer(16, 8192, 512, torch.bfloat16, cuda)
    layer = make_layer(40, 1024, 1024, torch.bfloat16, cuda, seed=1)
    x, ids, weights = make_tokens(layer, tokens, 4, seed=2)
    ids[0, 0] = 0
    routes = (tokens, 1) if written in ("hidden_states", "topk_ids") else (256, 8)
    first = make_tokens(before, *routes, seed=3)[:2]
    target = torch.empty(*routes, 2, 512, dtype=torch.bfloat16, device=cuda)
    if written == "hidden_states":
        x = target.view(tokens, 1024)
    elif written in ("gate_up", "down"):  # of expert 0, or of the first two
        target = getattr(layer, written).view(-1)[: target.numel()].view(target.shape)
    else:  # pairs of values: as integers no expert's ids, where zeros were before
        ids = target.view(torch.int32).view(-1)[: tokens * 4].view(tokens, 4)
    earlier, call = warpdecode.Experts(before.gate_up, before.down), experts_of(layer, kernel)
    warpdecode.moe_gate_up_3d_batched(earlier, *first, out=target)
    torch.cuda.synchronize()
    expected = call(x, ids, weights)
    for _ in range(20):
        target.zero_()
        unwritten = call(x, ids, weights)
        assert not torch.equal(unwritten, expected)
        torch.cuda._sleep(1_000_000)  # so that the call is enqueued before what is ahead of it begins
        warpdecode.moe_gate_up_3d_batched(earlier, *first, out=target)
        assert torch.equal(call(x, ids, weights), expected)


def copies(own, source):
    for to, new in zip(own, source, strict=True):
        to.copy_(new)


def kernels(own, source):
    for to, new in zip(own, source, strict=True):
        torch.add(new, 0, out=to)


def another_stream(own, source):
    other, here = torch.cuda.Stream(), torch.cuda.current_stream()
    other.wait_stream(here)
    with torch.cuda.stream(other):
        kernels(own[:2], source[:2])
    kernels(own[2:], source[2:])
    here.wait_stream(other)


def a_fill(own, source):
    copies(own, source)
    own[0].zero_()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("ahead", [copies, kernels, another_stream, a_fill])
def test_captured_behind(cuda, kernel, tokens, ahead):
    """What is ahead of a call in a graph is not always a kernel, or one alone; behind it is the same call again."""
    layer = make_layer(32, 1024, 512, torch.float16, cuda)
    call = experts_of(layer, kernel)
    given = [make_tokens(layer, tokens, 4, seed=seed) for seed in range(8)]
    source, own = ([tensor.clone() for tensor in given[0]] for _ in range(2))
    call(*own)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = call(*own)  # a graph's first node
        ahead(own, source)
        outs = [call(*own), call(*own)]
    for one in given:
        copies(source, one)
        ahead(own, source)
        torch.cuda.synchronize()
        expected = call(*own)
        copies(own, given[0])
        for out in (first, *outs):
            poison(out)
        graph.replay()
        assert torch.equal(first, call(*given[0]))
        assert all(torch.equal(out, expected) for out in outs)
