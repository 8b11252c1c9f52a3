"""transformers 4, which has one module an expert and no experts interface: blocks patched in place, no weight copied.
Runs where such a release is installed (.ci/run brings one), and skips elsewhere."""

import copy

import pytest
import torch

import cases
import hf_legacy
import hf_models
import hf_outside
import warpdecode.cli
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("4."):
    pytest.skip(f"transformers {transformers.__version__} is none of 4", allow_module_level=True)

TOKENS = hf_models.PROMPT[0] * hf_models.PROMPT[1]
FAMILIES = sorted(hf_legacy.FAMILIES)
A_FEW = ["mixtral", "qwen2_moe", "deepseek_v3"]  # of each kind one: a tuple, a shared expert, a method of its own


def _block(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if isinstance(m._modules.get("experts"), torch.nn.ModuleList))


@torch.no_grad()
@hf_outside.EVERYWHERE
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_its_own_forward_but_for_roundings(family, device, dtype):
    block = _block(hf_legacy.build(family, dtype)).to(device)
    x = torch.randn(3, 5, 64).to(device, dtype)
    own = block(x.clone())
    warpdecode.hf.patch(block, strict=True)
    with hf_models.counted_kernel_calls() as served:
        got = block(x.clone())
    assert served == [15] and type(got) is type(own)
    if isinstance(own, tuple):  # the router's logits: the block's own router, asked once in the same way
        assert len(got) == len(own) and torch.equal(got[1], own[1])
    hf_outside.assert_alike(got, own)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_compute_what_they_compute(family):
    model = hf_legacy.build(family)
    expected, before, keys = model(hf_models.prompt()).logits, hf_models.left_on(model), list(model.state_dict())
    addresses = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert warpdecode.hf.patch(model, strict=True) is model
    assert hf_models.served_calls(model) == [TOKENS] * hf_models.MOE_LAYERS
    assert torch.allclose(model(hf_models.prompt()).logits, expected, atol=1e-3)
    assert list(model.state_dict()) == keys
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == addresses
    rows = warpdecode.hf.explain(model)
    assert {(row.path, row.reason, row.E, row.H, row.I) for row in rows} == {("warp_decode", "patched", 8, 64, 40)}
    assert [row.name.endswith(".experts") for row in rows] == [True] * hf_models.MOE_LAYERS
    assert warpdecode.hf.unpatch(model) is model
    assert hf_models.left_on(model) == before and not hf_models.served_calls(model)
    assert torch.equal(model(hf_models.prompt()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
def test_generate(family):
    model = hf_legacy.build(family)
    own = model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False)
    warpdecode.hf.patch(model, strict=True)
    with hf_models.counted_kernel_calls() as served:
        assert torch.equal(model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False), own)
    assert len(served) == 6 * hf_models.MOE_LAYERS


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_on_the_gpu(family):
    hf_outside.check_on_the_gpu(hf_legacy.build(family, torch.bfloat16))


@torch.no_grad()
@hf_outside.EVERYWHERE
def test_the_experts_are_close_to_fp64(device, dtype):
    # DeepSeek's method takes ids and weights, so that what is compared is the experts alone.
    block = _block(hf_legacy.build("deepseek_v3", dtype)).to(device)
    x, ids = torch.randn(9, 64).to(device, dtype), torch.rand(9, 8).argsort(dim=1)[:, :3].contiguous().to(device)
    weights = torch.rand(9, 3).to(device)
    expected = copy.deepcopy(block).double().moe(x.double(), ids, weights.double()).cpu()
    got = warpdecode.hf.patch(block, strict=True).moe(x, ids, weights)
    assert cases.relative_error(got, expected) <= cases.error_bound(expected, dtype)


@torch.no_grad()
def test_the_router_is_asked_once_and_its_logits_are_returned():
    model = hf_legacy.build("qwen3_moe")
    expected = model(hf_models.prompt(), output_router_logits=True).router_logits
    warpdecode.hf.patch(model, strict=True)
    got = model(hf_models.prompt(), output_router_logits=True).router_logits
    # The second layer's input differs by roundings.
    assert len(got) == len(expected) == hf_models.MOE_LAYERS
    assert torch.equal(got[0], expected[0]) and torch.allclose(got[1], expected[1], atol=1e-4)
    warpdecode.hf.unpatch(model)  # transformers left the method that it had wrapped on the instance
    assert not hf_models.served_calls(model)
    assert hf_models.served_calls(warpdecode.hf.patch(model, strict=True)) == [TOKENS] * hf_models.MOE_LAYERS
    model.requires_grad_(True)
    with pytest.raises(WarpDecodeFallbackError, match="gradients are needed"), torch.enable_grad():
        model(hf_models.prompt(), output_router_logits=True)
    warpdecode.hf.patch(model)
    with pytest.warns(WarpDecodeFallbackWarning), torch.enable_grad():
        result = model(hf_models.prompt(), output_router_logits=True)
    assert len(result.router_logits) == hf_models.MOE_LAYERS


@pytest.mark.parametrize("family", A_FEW)
def test_copies_and_files(family):
    hf_models.check_copies(warpdecode.hf.patch(hf_legacy.build(family), strict=True))


@pytest.mark.parametrize("family", A_FEW)
def test_training_takes_the_own_forward(family):
    model = hf_legacy.build(family).requires_grad_(True)
    expected = model(hf_models.prompt()).logits
    warpdecode.hf.patch(model)
    with pytest.warns(WarpDecodeFallbackWarning, match=r"\(its own forward\).*gradients are needed"):
        got = model(hf_models.prompt()).logits
    assert torch.equal(got, expected)
    got.sum().backward()
    assert all(p.grad is not None for p in _block(model).gate.parameters())


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_only_the_router_needs_gradients(family):
    model = hf_legacy.build(family)
    block = _block(model)
    block.gate.weight.requires_grad_(True)
    warpdecode.hf.patch(block)
    with pytest.warns(WarpDecodeFallbackWarning, match=r"gate.weight requires grad"):
        hf_outside.output(block(torch.randn(1, 4, 64))).sum().backward()
    assert block.gate.weight.grad is not None


@torch.no_grad()
def test_noise_in_training_mode_is_the_block_s_own():
    block = _block(hf_legacy.build("mixtral"))
    block.jitter_noise = 0.1
    warpdecode.hf.patch(block)
    with hf_models.counted_kernel_calls() as served:
        block(torch.randn(1, 4, 64))
        block.train()
        with pytest.warns(WarpDecodeFallbackWarning, match=r"noise to its input in training mode \(jitter_noise=0.1\)"):
            block(torch.randn(1, 4, 64))
    assert served == [4]


class _LoRA(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.extra = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.extra(x)


class _Quantised(torch.nn.Linear):
    def forward(self, x):
        return torch.round(super().forward(x))


def _wrap(expert, name):
    setattr(expert, name, _LoRA(getattr(expert, name)).requires_grad_(False))


def _quantise(expert, name):
    getattr(expert, name).__class__ = _Quantised


def _swap(expert, name):
    made = _Quantised(1, 1, bias=False)
    made.weight = getattr(expert, name).weight  # the very same parameter
    setattr(expert, name, made)


def _hook(expert, name):
    getattr(expert, name).register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = {
    _wrap: "experts.3.up_proj is a _LoRA, not a plain torch.nn.Linear",
    _quantise: "experts.3.up_proj is a _Quantised, not a plain torch.nn.Linear",
    _swap: "experts.3.up_proj is a _Quantised, not a plain torch.nn.Linear",
    _hook: "experts.3.up_proj has hooks",
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_expert_of_other_modules_is_handed_back(change, when):
    model, same = hf_legacy.build("qwen3_moe"), hf_legacy.build("qwen3_moe")
    for each in (model, same):
        if when == "after" and each is model:
            warpdecode.hf.patch(each, strict=True)
            each(hf_models.prompt())
            warpdecode.hf.patch(each)
        change(_block(each).experts[3], "up_proj")
    same.load_state_dict(model.state_dict())
    if when == "before":
        assert CHANGES[change] in warpdecode.hf.explain(model)[0].reason
        with pytest.raises(WarpDecodeFallbackError, match=CHANGES[change]):
            warpdecode.hf.patch(model, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match=CHANGES[change]):
        warpdecode.hf.patch(model)
        block, x = _block(model), torch.randn(2, 9, 64)
        got = block(x)
    assert torch.equal(got[0], _block(same)(x)[0])
    assert hf_models.served_calls(model) == [TOKENS]  # the other layer


@torch.no_grad()
def test_a_block_that_routes_otherwise_is_handed_back():
    model = hf_legacy.build("qwen3_moe")
    block = _block(model)

    class Other(type(block)):
        def forward(self, hidden_states):
            hidden, logits = super().forward(hidden_states)
            return 1.001 * hidden, logits

    block.__class__ = Other
    assert "routes in none of the known ways" in warpdecode.hf.explain(block)[0].reason
    x = torch.randn(2, 3, 64)
    expected = block(x)[0]
    with pytest.warns(WarpDecodeFallbackWarning, match="none of the known ways"):
        assert torch.equal(warpdecode.hf.patch(block)(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("family", A_FEW)
def test_weights_are_those_of_the_call(family):
    model, other = hf_legacy.build(family), hf_legacy.build(family, seed=1)
    expected = warpdecode.hf.patch(other, strict=True)(hf_models.prompt()).logits
    warpdecode.hf.patch(model, strict=True)
    model(hf_models.prompt())
    for own, its in zip(model.parameters(), other.parameters(), strict=True):
        own.data = its.data.clone()
    assert torch.equal(model(hf_models.prompt()).logits, expected)
    assert hf_models.served_calls(model.bfloat16()) == [TOKENS] * hf_models.MOE_LAYERS


@torch.no_grad()
@pytest.mark.parametrize("family", A_FEW)
def test_compiled_without_a_graph_break(family):
    torch._dynamo.reset()
    model = warpdecode.hf.patch(hf_legacy.build(family), strict=True)
    block, x = _block(model), torch.randn(2, 3, 64)
    expected = block(x)
    with hf_models.counted_kernel_calls() as served:
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert served == [6] and torch.allclose(hf_outside.output(got), hf_outside.output(expected), atol=1e-5)


def test_the_demo_says_what_it_needs(capfd):
    assert warpdecode.cli.main(["generate"]) == 1
    assert "the demo model needs transformers 5.3 or newer, installed is 4." in capfd.readouterr().err


def test_what_needs_the_interface_says_so():
    for function, since in ((warpdecode.hf.register, "5.7"), (warpdecode.hf.accelerate_decode, "5.0")):
        with pytest.raises(RuntimeError, match=rf"experts interface, which transformers 4\..*; {since} and newer do"):
            function()


# ---- experts that are a few tensors, and take a weight for every expert


def _experts(model) -> torch.nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def _dense_call(device, dtype, scale: float = 1.0) -> dict:
    """Hidden states of two sequences, and their routing, by name."""
    ids = torch.rand(10, 8).argsort(dim=1)[:, :2].contiguous()
    weights = torch.zeros(10, 8).scatter_(1, ids, torch.rand(10, 2))
    return {
        "hidden_states": (scale * torch.randn(2, 5, 64)).to(device, dtype),
        "router_indices": ids.to(device),
        "routing_weights": weights.to(device, dtype),
    }


@torch.no_grad()
@hf_outside.EVERYWHERE
@pytest.mark.parametrize("scale", [1.0, 8.0])  # where gpt-oss' limits are met
@pytest.mark.parametrize("family", hf_legacy.STACKED)
def test_stacked_experts_are_their_own_forward_but_for_roundings(family, scale, device, dtype):
    experts, call = _experts(hf_legacy.build_stacked(family, dtype)).to(device), _dense_call(device, dtype, scale)
    own = experts(**call)
    warpdecode.hf.patch(experts, strict=True)
    with hf_models.counted_kernel_calls() as served:
        got = experts(**call)
        names = ["hidden_states", "routing_weights", "router_indices"]  # Qwen3-VL's order
        if family == "gpt_oss":
            names = ["hidden_states", "router_indices", "routing_weights"]
        assert torch.equal(experts(*map(call.get, names)), got)
    assert served == [10, 10]
    hf_outside.assert_alike(got, own)


@torch.no_grad()
@pytest.mark.parametrize("family", hf_legacy.STACKED)
def test_patched_models_of_stacked_experts_compute_what_they_compute(family):
    model = hf_legacy.build_stacked(family)
    expected, before = model(hf_models.prompt())[0], hf_models.left_on(model)
    warpdecode.hf.patch(model, strict=True)
    assert hf_models.served_calls(model) == [TOKENS] * hf_models.MOE_LAYERS
    assert torch.allclose(model(hf_models.prompt())[0], expected, atol=1e-3)
    rows = warpdecode.hf.explain(model)
    assert {(row.path, row.reason, row.E, row.H, row.I) for row in rows} == {("warp_decode", "patched", 8, 64, 40)}
    twin = copy.deepcopy(model)
    assert hf_models.left_on(warpdecode.hf.unpatch(model)) == before and not hf_models.served_calls(model)
    assert torch.equal(model(hf_models.prompt())[0], expected) and hf_models.served_calls(twin)
    warpdecode.hf.patch(model.requires_grad_(True))
    with pytest.warns(WarpDecodeFallbackWarning, match="gradients are needed"), torch.enable_grad():
        assert torch.equal(model(hf_models.prompt())[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("family", hf_legacy.STACKED)
def test_stacked_experts_compiled_and_with_other_weights(family):
    torch._dynamo.reset()
    experts, call = _experts(hf_legacy.build_stacked(family)), _dense_call("cpu", torch.float32)
    warpdecode.hf.patch(experts, strict=True)
    for parameter in (experts.down_proj, experts.gate_up_proj):
        before = experts(**call)
        parameter.data = 1.5 * parameter.data
        assert not torch.allclose(experts(**call), before, rtol=0.01)
    with hf_models.counted_kernel_calls() as served:
        got = torch.compile(experts, fullgraph=True, backend="aot_eager")(**call)
    assert served == [10]
    hf_outside.assert_alike(got, warpdecode.hf.unpatch(experts)(**call))


@torch.no_grad()
def test_gpt_oss_mark_for_another_process_s_experts_contributes_nothing():
    experts, call = _experts(hf_legacy.build_stacked("gpt_oss")), _dense_call("cpu", torch.float32)
    token = torch.arange(10)
    call["routing_weights"][token, call["router_indices"][:, 1]] = 0
    call["router_indices"][:, 1] = 8
    expected = experts(**call)
    with hf_models.counted_kernel_calls() as served:
        got = warpdecode.hf.patch(experts, strict=True)(**call)
    assert served
    hf_outside.assert_alike(got, expected)


@torch.no_grad()
def test_a_limit_that_is_changed_is_seen():
    experts, call = _experts(hf_legacy.build_stacked("gpt_oss")), _dense_call("cpu", torch.float32, 8.0)
    warpdecode.hf.patch(experts, strict=True)
    before = experts(**call)
    experts.limit = 3.0
    got = experts(**call)
    assert not torch.allclose(got, before, rtol=0.01)
    hf_outside.assert_alike(got, warpdecode.hf.unpatch(experts)(**call))


def _of_another_order(base):
    class Experts(base):
        def forward(self, hidden_states, router_indices=None, routing_weights=None):
            kept = self.gate_up_proj.data
            self.gate_up_proj.data = kept.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            try:
                return super().forward(hidden_states, router_indices, routing_weights)
            finally:
                self.gate_up_proj.data = kept

    return Experts


def _of_no_limit(base):
    class Experts(base):
        def forward(self, hidden_states, router_indices=None, routing_weights=None):
            kept, self.limit = self.limit, 1e4
            try:
                return super().forward(hidden_states, router_indices, routing_weights)
            finally:
                self.limit = kept

    return Experts


@torch.no_grad()
@pytest.mark.parametrize("other", [_of_another_order, _of_no_limit])
def test_stacked_experts_that_compute_something_else_are_handed_back(other):
    experts, call = _experts(hf_legacy.build_stacked("gpt_oss")), _dense_call("cpu", torch.float32)
    experts.__class__ = other(type(experts))
    expected = experts(**call)
    with pytest.warns(WarpDecodeFallbackWarning, match="differs from the kernels' result on a probe"):
        assert torch.equal(warpdecode.hf.patch(experts)(**call), expected)


def test_experts_of_two_calls_are_handed_back():
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeConfig, GraniteMoeMoE

    block = GraniteMoeMoE(GraniteMoeConfig(hidden_size=32, intermediate_size=48, num_local_experts=4))
    assert {"experts interface" in row.reason for row in warpdecode.hf.explain(block)} == {True}
