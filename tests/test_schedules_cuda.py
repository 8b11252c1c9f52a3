"""What each CUDA schedule does at its edges has the bits of another schedule. torch.equal throughout, no tolerance."""

import pytest
import torch

import warpdecode
from cases import make_layer, make_tokens, poison
from test_moe import experts_of
from warpdecode._ffi import check, ffi, lib
from warpdecode.frameworks import _torch

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)


def assert_same_bits(layer, inputs, one, other):
    """Of two kernels."""
    calls = [experts_of(layer, kernel) for kernel in (one, other)]
    assert torch.equal(*(call(*inputs) for call in calls))


@pytest.mark.parametrize(("hidden", "intermediate"), [(1 << 20, 8), (8, 1 << 20)])
def test_direct_leaves_rows_that_its_grid_has_no_room_for(cuda, hidden, intermediate):
    layer = make_layer(1, hidden, intermediate, torch.bfloat16, cuda)
    one = make_tokens(layer, 1, 1, seed=3)
    chosen, grouped = (
        warpdecode.Experts(layer.gate_up, layer.down, kernel=name)(*one) for name in (None, "cuda_grouped")
    )
    assert torch.equal(chosen, grouped) and chosen.isfinite().all()
    with pytest.raises(ValueError, match="hidden and intermediate up to 1048560"):
        warpdecode.Experts(layer.gate_up, layer.down, kernel="cuda_direct")(*one)


@pytest.mark.parametrize("kernel", ["cuda_grouped", "cuda_tiled"])
def test_replays_with_other_ids(cuda, kernel):
    """The lists of routes lie where those of the replay before lay, and nothing of those may be read."""
    layer = make_layer(32, 512, 256, torch.bfloat16, cuda)
    call, direct = experts_of(layer, kernel), experts_of(layer, "cuda_direct")
    inputs = [make_tokens(layer, 600, 4, seed=seed) for seed in range(40)]
    expected = [direct(*one) for one in inputs]
    own = [tensor.clone() for tensor in inputs[0]]
    call(*own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*own)
    for one, wanted in zip(inputs, expected, strict=True):
        for tensor, new in zip(own, one, strict=True):
            tensor.copy_(new)
        poison(out)
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("kernel", ["cuda_grouped", "cuda_tiled"])
@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate", "tokens"),  # of grouped: small blocks, large ones, larger ones; lists; splits
    [(16, 4096, 3072, tokens) for tokens in (8, 40, 160, 300)] + [(8, 4608, 5504, 256)],
)
def test_what_an_earlier_call_left_in_the_workspace(cuda, monkeypatch, kernel, experts, hidden, intermediate, tokens):
    """down begins before gate_up has ended, and waits for the experts that it serves: for those of this call. gate_up
    has more blocks than run at once, and the workspace has the marks and the intermediate of the call before."""
    layer = make_layer(experts, hidden, intermediate, torch.bfloat16, cuda)
    call, direct = experts_of(layer, kernel), experts_of(layer, "cuda_direct")
    inputs = [make_tokens(layer, tokens, 4, seed=seed) for seed in range(10)]
    expected = [direct(*one) for one in inputs]
    owners = {}

    def workspace(size, like):
        if size not in owners:
            owners[size] = torch.ones(size // 4 + 1, dtype=torch.int32, device=like.device)
        return owners[size].data_ptr(), owners[size]

    monkeypatch.setattr(_torch, "workspace", workspace)
    found = [call(*one) for one in inputs]
    assert len(owners) == 1
    assert all(torch.equal(out, wanted) for out, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    # one chunk, a step, half a step more; many; so many that items share no rows; that items have two units
    ("hidden", "intermediate"),
    [(328, 24), (328, 64), (328, 72), (328, 424), (328, 480), (1160, 600), (4424, 72), (136, 1160)],
)
@pytest.mark.parametrize(
    "lengths",  # few routes an expert to many: items of down and gate_up end at 32 and 64, 80 and 64 or 128, 64 and 128
    [
        (0, 65, 1, 7, 8, 9, 33, 64, *64 * (5,)),  # gate_up's columns are tokens
        (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 97, 128, 129, 200, *56 * (16,)),  # so they are from 480 neurons on
        (0, 63, 64, 65, 96, 97, 128, 129, *96 * (40,)),  # from 424 on; more routes than down meets by expert
        (1, 8, 9, 31, 32, 33, 64, 81),
        (0, 63, 64, 65, 72, 80, 81, 100),
        (64, 65, 80, 81, 128, 129, 200, 1),
    ],
)
def test_lists_that_just_fill_an_item(cuda, lengths, hidden, intermediate, dtype):
    """Experts with so many routes, one more and one less: the layer, and each of the two kernels alone."""
    layer = make_layer(len(lengths), hidden, intermediate, dtype, cuda)
    x, _, weights = make_tokens(layer, sum(lengths), 1, seed=intermediate)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[torch.randperm(sum(lengths))]
    ids = ids[:, None].to(cuda)
    tiled, grouped = experts_of(layer, "cuda_tiled"), experts_of(layer, "cuda_grouped")
    assert torch.equal(tiled(x, ids, weights), grouped(x, ids, weights))
    middle = warpdecode.moe_gate_up_3d_batched(tiled, x, ids)
    assert torch.equal(middle, warpdecode.moe_gate_up_3d_batched(grouped, x, ids))
    assert torch.equal(*(warpdecode.moe_down_3d_batched(call, middle, ids, weights) for call in (tiled, grouped)))


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
@pytest.mark.parametrize("tokens", [64, 256, 700])
@pytest.mark.parametrize(("experts", "hidden", "intermediate"), [(8, 4864, 336), (2, 264, 520), (16, 136, 64)])
def test_items_that_share_the_rows_of_few_experts(cuda, experts, hidden, intermediate, tokens, routing):
    """Where there would be few items, an expert's routes are shared by several, and none is lost or served twice."""
    layer = make_layer(experts, hidden, intermediate, torch.bfloat16, cuda)
    inputs = make_tokens(layer, tokens, 2, seed=tokens, routing=routing)
    assert_same_bits(layer, inputs, "cuda_tiled", "cuda_grouped")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routes", [6, 8, 20, 24, 33, 50, 72, 90, 140])  # an expert
@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate"),  # long rows of gate_up, of down; short ones; items of two rounds
    [(8, 4872, 336), (8, 1736, 2056), (5, 72, 968), (200, 128, 64)],
)
def test_items_of_one_unit(cuda, experts, hidden, intermediate, routes, dtype):
    """Both warpgroups of tiled multiply one unit where units are few, as most of gate_up's are here."""
    layer = make_layer(experts, hidden, intermediate, dtype, cuda)
    x, ids, weights = make_tokens(layer, experts * routes // 2, 2, seed=routes)
    tiled, grouped = experts_of(layer, "cuda_tiled"), experts_of(layer, "cuda_grouped")
    for tokens in (x.shape[0], x.shape[0] - 1):
        inputs = x[:tokens], ids[:tokens], weights[:tokens]
        assert torch.equal(tiled(*inputs, out=poison(torch.empty_like(inputs[0]))), grouped(*inputs))
    middle = warpdecode.moe_gate_up_3d_batched(tiled, x, ids)
    assert torch.equal(middle, warpdecode.moe_gate_up_3d_batched(grouped, x, ids))
    assert torch.equal(*(warpdecode.moe_down_3d_batched(call, middle, ids, weights) for call in (tiled, grouped)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2112, 128), (2112, 384), (2120, 256), (2112, 264)])
def test_down_of_more_blocks_than_run_at_once(cuda, hidden, intermediate, dtype):
    """grouped's down takes 256 bytes of a row at a time where its blocks fill the GPU more than twice."""
    layer = make_layer(64, hidden, intermediate, dtype, cuda)
    inputs = make_tokens(layer, 24, 4, seed=hidden + intermediate)
    assert_same_bits(layer, inputs, "cuda_grouped", "cuda_direct")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "intermediate"),  # steps of 64 values: one, three, five and a half, eight; of gate_up, then of down
    [(40, 5120), (136, 5120), (328, 5120), (512, 5120), (10240, 40), (10240, 136), (10240, 328), (10240, 512)],
)
def test_blocks_that_take_many_items(cuda, hidden, intermediate, dtype):
    """More items a block than tiled has places for, of fewer steps than its rings have, and of more."""
    layer = make_layer(64, hidden, intermediate, dtype, cuda)
    inputs = make_tokens(layer, 160, 2, seed=hidden + intermediate)
    assert_same_bits(layer, inputs, "cuda_tiled", "cuda_grouped")


@pytest.mark.parametrize("top_k", [1, 8, 10])
@pytest.mark.parametrize(("experts", "intermediate"), [(16, 256), (32, 1024)])  # columns of so many neurons are tokens
def test_the_workspace_of_more_tokens_serves_fewer(cuda, experts, intermediate, top_k):
    """So a shorter last pass has room in what was asked for the first."""
    layer = make_layer(experts, 512, intermediate, torch.bfloat16, cuda)
    call, size = warpdecode.Experts(layer.gate_up, layer.down), ffi.new("size_t *")
    struct = call._description.struct  # points into what `call` owns
    sizes = []
    for tokens in range(1, 4096 // top_k + 400, 1 if top_k > 1 else 7):
        check(lib.wd_moe_workspace_size(struct, tokens, top_k, size))
        sizes.append(size[0])
    assert sizes == sorted(sizes)


def test_direct_has_room_for_many_routes(cuda):
    """More routes than a grid's second axis has blocks."""
    layer = make_layer(8, 16, 8, torch.bfloat16, cuda)
    inputs = make_tokens(layer, 70_000, 1)
    assert_same_bits(layer, inputs, "cuda_direct", "cuda_grouped")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direct_has_all_the_shared_memory_that_it_needs(cuda, dtype):
    """On 132 multiprocessors 408 blocks have shares of 46 KB, which is what five slots' rings need, and no more."""
    layer = make_layer(16, 6528, 264, dtype, cuda)
    inputs = make_tokens(layer, 1, 5, seed=5)
    assert_same_bits(layer, inputs, "cuda_direct", "cuda_grouped")
