"""Blocks with one module an expert, as remote code has them: classes of this file, so with every transformers."""

import pytest
import torch
from torch.nn import functional

import cases
import hf_models
import hf_outside
import warpdecode.hf

E, K, H, INTER, T = 8, 3, 72, 40, 11


class _Expert(torch.nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj = torch.nn.Linear(H, INTER, bias=bias)
        self.up_proj = torch.nn.Linear(H, INTER, bias=bias)
        self.down_proj = torch.nn.Linear(INTER, H, bias=bias)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _summed(experts, tokens, ids, weights) -> torch.Tensor:
    """The weighted sum over the experts; weights keep their dtype, as DeepSeek's method has it."""
    out = torch.zeros(tokens.shape, dtype=weights.dtype, device=tokens.device)
    for number, expert in enumerate(experts):
        token, slot = torch.where(ids == number)
        out.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(out.dtype))
    return out.to(tokens.dtype)


class _Routes(torch.nn.Module):
    """Its forward routes and runs the experts in one."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.gate, self.top_k, self.norm_topk_prob = torch.nn.Linear(H, E, bias=False), K, True
        self.experts = torch.nn.ModuleList([_Expert(bias) for _ in range(E)])

    def _route(self, tokens):
        logits = self.gate(tokens)
        weights, ids = functional.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        return logits, ids, weights / weights.sum(dim=-1, keepdim=True)

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, H)
        logits, ids, weights = self._route(tokens)
        return _summed(self.experts, tokens, ids, weights.to(tokens.dtype)).view(hidden_states.shape), logits


class _HasMoe(_Routes):
    """Its experts are a method of their own."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        return _summed(self.experts, hidden_states, topk_indices, topk_weights)

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, H)
        _, ids, weights = self._route(tokens)
        return self.moe(tokens, ids, weights).view(hidden_states.shape)


@torch.no_grad()
def _built(kind, dtype, device, bias: bool = False) -> torch.nn.Module:
    block = kind(bias).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(1.5 * torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return block.to(device, dtype)


def _call(dtype, device, tokens: int = T) -> tuple[torch.Tensor, ...]:
    ids = torch.rand(tokens, E).argsort(dim=1)[:, :K].contiguous()
    return torch.randn(tokens, H).to(device, dtype), ids.to(device), torch.rand(tokens, K).to(device)


def _stacked(block) -> warpdecode.Experts:
    gates, ups, downs = (
        torch.stack([getattr(expert, name).weight for expert in block.experts])
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return warpdecode.Experts(torch.cat([gates, ups], dim=1), downs)


@torch.no_grad()
@hf_outside.EVERYWHERE
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("kind", [_Routes, _HasMoe])
def test_a_block_is_its_own_forward_but_for_roundings(kind, bias, device, dtype):
    block, x = _built(kind, dtype, device, bias), torch.randn(3, 5, H).to(device, dtype)
    own = block(x)
    warpdecode.hf.patch(block, strict=True)
    with hf_models.counted_kernel_calls() as served:
        got = block(x)
    assert served == [15]
    hf_outside.assert_alike(got, own)
    if kind is _Routes:
        assert torch.equal(got[1], own[1])


@torch.no_grad()
@hf_outside.EVERYWHERE
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_the_experts_are_close_to_fp64(bias, device, dtype):
    block, call = _built(_HasMoe, dtype, device, bias), _call(dtype, device)
    x, ids, weights = call
    got = warpdecode.hf.patch(block, strict=True).moe(*call)
    expected = warpdecode.hf.unpatch(block).double().moe(x.double(), ids, weights.double()).cpu()
    assert cases.relative_error(got, expected) <= cases.error_bound(expected, dtype)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, T, 300])  # a schedule each
def test_the_bits_are_those_of_stacked_weights_and_of_the_token_alone(tokens, device):
    block, call = _built(_HasMoe, torch.bfloat16, device), _call(torch.bfloat16, device, tokens)
    expected = _stacked(block)(*call)
    got = warpdecode.hf.patch(block, strict=True).moe(*call)
    assert torch.equal(got, expected)
    last = slice(tokens - 1, tokens)
    assert torch.equal(block.moe(*[each[last] for each in call]), got[last])


@torch.no_grad()
def test_weights_given_other_memory_or_changed_in_place(device):
    block, call = _built(_HasMoe, torch.bfloat16, device), _call(torch.bfloat16, device)
    before = warpdecode.hf.patch(block, strict=True).moe(*call)
    for expert, name in (
        (block.experts[E - 1], "gate_proj"),
        (block.experts[0], "up_proj"),
        (block.experts[3], "down_proj"),
    ):
        weight = getattr(expert, name).weight
        weight.data = 2 * weight.data  # the same Parameter elsewhere
        moved = block.moe(*call)
        assert torch.equal(moved, _stacked(block)(*call)) and not torch.equal(moved, before)
        weight.mul_(0.25)
        before = block.moe(*call)
        assert torch.equal(before, _stacked(block)(*call)) and not torch.equal(moved, before)
        getattr(expert, name).weight = torch.nn.Parameter(torch.randn_like(weight) / 8, requires_grad=False)
        moved = block.moe(*call)
        assert torch.equal(moved, _stacked(block)(*call)) and not torch.equal(moved, before)
        before = moved


def _hook(part):
    part.register_forward_hook(lambda module, args, output: 2 * output)


def _pre_hook(part):
    part.register_forward_pre_hook(lambda module, args: (2 * args[0],))


class _Doubles(_Expert):
    def forward(self, x):
        return 2 * super().forward(x)


class _Rounds(torch.nn.Linear):
    def forward(self, x):
        return torch.round(super().forward(x))


def _same_weight(expert):
    made = _Rounds(1, 1, bias=False)
    made.weight = expert.down_proj.weight
    expert.down_proj = made


CHANGES = {
    "a hook on an expert": (lambda block: _hook(block.experts[5]), "experts.5 has hooks"),
    "a hook on an expert, before": (lambda block: _pre_hook(block.experts[5]), "experts.5 has hooks"),
    "a hook on a Linear": (lambda block: _hook(block.experts[5].up_proj), "experts.5.up_proj has hooks"),
    "a hook on an activation": (lambda block: _hook(block.experts[5].act_fn), "experts.5.act_fn has hooks"),
    "another expert": (
        lambda block: setattr(block.experts, "5", _built(_HasOther, *KIND).experts[0]),
        "expert 5 is a _",
    ),
    "another class": (lambda block: setattr(block.experts[5], "__class__", _Doubles), "expert 5 is a _Doubles"),
    "a Linear's class": (
        lambda block: setattr(block.experts[5].up_proj, "__class__", _Rounds),
        "experts.5.up_proj is a _Rounds",
    ),
    "a Linear with the same weight": (lambda block: _same_weight(block.experts[5]), "experts.5.down_proj is a _Rounds"),
    "one activation": (
        lambda block: setattr(block.experts[5], "act_fn", torch.nn.GELU()),
        r"experts.5.act_fn and experts.0.act_fn are not alike: GELU\(approximate='none'\) and SiLU\(\)",
    ),
}
KIND = torch.bfloat16, "cpu"


class _HasOther(_HasMoe):
    def __init__(self, bias: bool = False):
        super().__init__(bias)
        self.experts = torch.nn.ModuleList([_Doubles(bias) for _ in range(E)])


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before the patch", "after it"])
def test_an_expert_unlike_the_others_is_handed_back(name, when):
    change, reason = CHANGES[name]
    block, call = _built(_HasMoe, *KIND), _call(*KIND)
    if when == "before the patch":
        change(block)
        assert reason.split(r"\(")[0] in warpdecode.hf.explain(block)[0].reason
    with pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match=reason):
        warpdecode.hf.patch(block)
        if when == "after it":
            with hf_models.counted_kernel_calls() as served:
                block.moe(*call)
            assert served
            change(block)
        with hf_models.counted_kernel_calls() as served:
            got = block.moe(*call)
    assert not served and torch.equal(got, type(block).moe(warpdecode.hf.unpatch(block), *call))


@torch.no_grad()
def test_activations_of_all_experts_changed_are_seen():
    block, call = warpdecode.hf.patch(_built(_HasMoe, *KIND), strict=True), _call(*KIND)
    before = block.moe(*call)
    for expert in block.experts:
        expert.act_fn = torch.nn.GELU()
    with hf_models.counted_kernel_calls() as served:
        got = block.moe(*call)
    assert served and not torch.equal(got, before)
    hf_outside.assert_alike(got, warpdecode.hf.unpatch(block).moe(*call))


def test_functions_that_experts_hold_are_compared():
    block = _built(_HasMoe, *KIND)
    for expert in block.experts:
        del expert.act_fn
        expert.act_fn = functional.silu
    assert warpdecode.hf.explain(block)[0].reason == "it is not patched; the kernels can serve it"
    block.experts[5].act_fn = functional.relu
    assert "experts.5 and experts.0 are not alike" in warpdecode.hf.explain(block)[0].reason
    block.experts[5].act_fn = functional.silu
    block.experts[5].forward = lambda x: x
    assert "experts.5 has hooks or a forward of its own" in warpdecode.hf.explain(block)[0].reason


@torch.no_grad()
@pytest.mark.parametrize("kind", [_Routes, _HasMoe])
def test_a_block_on_the_meta_device_is_handed_back_until_it_is_patched_again(kind):
    loaded, x = _built(kind, *KIND), torch.randn(3, 5, H).to(KIND[0])
    expected = loaded(x)
    with torch.device("meta"):
        block = kind().to(KIND[0]).requires_grad_(False)
    with pytest.raises(warpdecode.hf.WarpDecodeFallbackError, match="on the meta device"):
        warpdecode.hf.patch(block, strict=True)
    with pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match=r"on the meta device \(offloaded, or not loaded"):
        warpdecode.hf.patch(block)
    block.load_state_dict(loaded.state_dict(), assign=True)
    with hf_models.counted_kernel_calls() as served:
        assert torch.equal(hf_outside.output(block(x)), hf_outside.output(expected)) and not served
        hf_outside.assert_alike(warpdecode.hf.patch(block, strict=True)(x), expected)
    assert served


def _captured(run):
    """A CUDA graph of `run()` after one warm-up call on another stream, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_captured_in_a_cuda_graph():
    block = warpdecode.hf.patch(_built(_HasMoe, torch.bfloat16, "cuda"), strict=True)
    call = _call(torch.bfloat16, "cuda")
    graph, experts = _captured(lambda: block.moe(*call))
    whole, output = _captured(lambda: block(call[0]))
    for _ in range(2):
        call[0].copy_(torch.randn(T, H))
        graph.replay()
        whole.replay()
        assert torch.equal(experts, block.moe(*call))
        hf_outside.assert_alike(output, block(call[0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", [_Routes, _HasMoe])
def test_compiled_without_a_graph_break(kind, device):
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    block, x = warpdecode.hf.patch(_built(kind, dtype, device), strict=True), torch.randn(2, 3, H).to(device, dtype)
    expected = block(x)
    with hf_models.counted_kernel_calls() as served:
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert served == [6]
    hf_outside.assert_alike(got, expected)
