"""Experts outside transformers' experts interface: Llama 4, DBRX, LongCat, Step 3. Patched, compared with their own
forward and with FP64, put back."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import cases
import hf_models
import hf_outside
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

CLASS = re.compile(r"((?:^@.*\n)*)^class (\w*Experts)\(nn\.Module(?:Dict|List)?\):", re.MULTILINE)

E, K, H, INTER, T = 8, 3, 72, 40, 11
ZEROS = 4  # LongCat's identity experts


def _random(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        scale = 4.0 if name.rpartition(".")[2] in ("gate_up_proj", "w1", "v1") else 1.0
        parameter.data = (torch.randn(parameter.shape) * scale * min(H, INTER) ** -0.5).to(dtype)
    return module.eval().requires_grad_(False)


def _experts(family, name, *args, **config):
    return hf_outside.class_of(family, name)(SimpleNamespace(**config), *args)


def _step3p7():
    return _experts(
        "step3p7", "Step3p7Experts", 2.0, num_local_experts=E, hidden_size=H, moe_intermediate_size=INTER,
        hidden_act="silu",
    )  # fmt: skip


def _longcat_flash():
    return _experts(
        "longcat_flash", "LongcatFlashExperts", expert_ffn_hidden_size=INTER, hidden_size=H, n_routed_experts=E,
        zero_expert_num=ZEROS, hidden_act="silu",
    )  # fmt: skip


def _dbrx():
    return _experts(
        "dbrx", "DbrxExperts", ffn_hidden_size=INTER, hidden_size=H, moe_num_experts=E, ffn_act_fn={"name": "silu"}
    )


def _llama4():
    return _experts(
        "llama4", "Llama4TextMoe", hidden_size=H, intermediate_size=INTER, num_local_experts=E, num_experts_per_tok=1,
        hidden_act="silu",
    )  # fmt: skip


MODULES = {"step3p7": _step3p7, "longcat_flash": _longcat_flash, "dbrx": _dbrx, "llama4": _llama4}


def _built(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    return _random(MODULES[family](), dtype).to(device)


def _call(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    x = torch.randn(T, H).to(device, dtype)
    if family == "llama4":
        return (x,)
    ids = torch.rand(T, E + (ZEROS if family == "longcat_flash" else 0)).argsort(dim=1)[:, :K].contiguous()
    return x.view(1, T, H) if family == "dbrx" else x, ids.to(device), torch.rand(T, K).to(device, dtype)


def _doubled(call):
    return tuple(value.double() if value.is_floating_point() else value for value in call)


def _exact(family, module, call):
    """The own forward in float64, brought to the CPU. Llama 4's router and shared expert as they are in the module's
    dtype: what differs is then the experts alone, with the scores that were rounded to that dtype."""
    if family != "llama4":
        return copy.deepcopy(module).double()(*_doubled(call)).cpu()
    scores, _ = module.router(*call)
    routed = call[0].double().repeat(E, 1) * scores.double().t().reshape(-1, 1)
    return copy.deepcopy(module.experts).double()(routed).view(E, T, H).sum(0).cpu()


@torch.no_grad()
@hf_outside.EVERYWHERE
@pytest.mark.parametrize("family", MODULES)
def test_it_is_served_and_close_to_fp64(family, device, dtype):
    module, call = _built(family, dtype, device), _call(family, dtype, device)
    if family == "llama4":  # of the sum, the experts' part: their rounding would be lost in the shared expert's
        for parameter in module.shared_expert.parameters():
            parameter.zero_()
    expected, own = _exact(family, module, call), module(*call)
    warpdecode.hf.patch(module, strict=True)
    with hf_models.counted_kernel_calls() as served:
        got = module(*call)
    assert served == [T]
    assert hf_outside.output(got).dtype == dtype and hf_outside.output(got).shape == hf_outside.output(own).shape
    assert hf_outside.output(got).device.type == device
    bound = cases.error_bound(expected, dtype)
    if family == "longcat_flash":  # the kernels' result is rounded, and then its sum with the identities
        bound = 2 * bound
    assert cases.relative_error(hf_outside.output(got).view(expected.shape), expected) <= bound
    assert (
        cases.relative_error(hf_outside.output(own).view(expected.shape), expected) <= hf_outside.OWN_ROUNDINGS * bound
    )
    if family == "llama4":
        assert torch.equal(got[1], own[1])


@torch.no_grad()
def test_llama4_multiplies_before_it_rounds(device):
    # Its own forward rounds weight times hidden state to bfloat16 first.
    module, call = _built("llama4", torch.bfloat16, device), _call("llama4", torch.bfloat16, device)
    for parameter in module.shared_expert.parameters():
        parameter.zero_()
    expected, own = _exact("llama4", module, call), module(*call)[0]
    got = warpdecode.hf.patch(module, strict=True)(*call)[0]
    assert cases.relative_error(got, expected) < 0.75 * cases.relative_error(own, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(MODULES.keys() - {"llama4"}))  # its block has torch's matmuls, too
def test_the_bits_depend_on_the_token_alone(family, device):
    module = warpdecode.hf.patch(_built(family, torch.bfloat16, device), strict=True)
    call = _call(family, torch.bfloat16, device)
    alone = [
        hf_outside.output(module(*(t[:, i : i + 1] if t.dim() == 3 else t[i : i + 1] for t in call))) for i in range(T)
    ]
    together = hf_outside.output(module(*call))
    assert torch.equal(torch.cat([a.reshape(1, H) for a in alone]), together.reshape(T, H))


# ---- models


@torch.no_grad()
@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_patched_models_generate_what_they_generate(family):
    model = hf_outside.build(family)
    expected, before = model(hf_models.prompt()).logits, hf_models.left_on(model)
    own = model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False)
    names = [row.name for row in warpdecode.hf.explain(model)]
    assert warpdecode.hf.patch(model, strict=True) is model
    assert hf_models.served_calls(model) == [hf_models.PROMPT[0] * hf_models.PROMPT[1]] * hf_models.MOE_LAYERS
    assert torch.allclose(model(hf_models.prompt()).logits, expected, atol=1e-3)
    with hf_models.counted_kernel_calls() as served:
        assert torch.equal(model.generate(hf_models.prompt(), max_new_tokens=6, do_sample=False), own)
    assert len(served) == 6 * hf_models.MOE_LAYERS
    rows = warpdecode.hf.explain(model)
    assert [row.name for row in rows] == names
    assert {(row.path, row.reason, row.E, row.H) for row in rows} == {("warp_decode", "patched", E, 64)}
    assert warpdecode.hf.unpatch(model) is model
    assert hf_models.left_on(model) == before and not hf_models.served_calls(model)
    assert torch.equal(model(hf_models.prompt()).logits, expected)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_patched_models_on_the_gpu(family):
    hf_outside.check_on_the_gpu(hf_outside.build(family, torch.bfloat16))


@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_state_copies_and_files(family):
    model = hf_outside.build(family)
    keys = list(model.state_dict())
    warpdecode.hf.patch(model)
    assert list(model.state_dict()) == keys
    twin, loaded = hf_models.check_copies(model)
    warpdecode.hf.unpatch(twin)
    assert not hf_models.served_calls(twin) and hf_models.served_calls(loaded)
    assert all(type(a) is type(b) for a, b in zip(twin.modules(), hf_outside.build(family).modules(), strict=True))


@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_a_scope_ends_with_what_was_before_it(family):
    model = hf_outside.build(family)
    before = hf_models.left_on(model)
    with warpdecode.hf.patched(model):
        assert hf_models.served_calls(model)
        with warpdecode.hf.patched(model, strict=True), pytest.raises(WarpDecodeFallbackError):
            model.requires_grad_(True)(hf_models.prompt())
        with pytest.warns(WarpDecodeFallbackWarning):  # strict no more
            model(hf_models.prompt())
    assert hf_models.left_on(model) == before
    assert not hf_models.served_calls(model.requires_grad_(False))


@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_what_cannot_be_served_is_said_and_takes_the_own_forward(family):
    model = hf_outside.build(family)
    expected = model.requires_grad_(True)(hf_models.prompt()).logits
    warpdecode.hf.patch(model)
    with pytest.warns(WarpDecodeFallbackWarning, match=r"\(its own forward\).*gradients are needed.*requires grad"):
        got = model(hf_models.prompt()).logits
    assert torch.equal(got, expected) and got.requires_grad
    got.sum().backward()
    model.requires_grad_(False)
    if family != "dbrx":  # whose own forward cannot run under autocast
        match = "autocast to torch.bfloat16 is on|hidden_states is torch.bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(WarpDecodeFallbackWarning, match=match):
            assert not hf_models.served_calls(model)


@torch.no_grad()
@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_weights_are_those_of_the_call(family):
    model, other = hf_outside.build(family), hf_outside.build(family, seed=1)
    with torch.no_grad():
        expected = warpdecode.hf.patch(other, strict=True)(hf_models.prompt()).logits
    warpdecode.hf.patch(model, strict=True)
    model(hf_models.prompt())
    for (_, own), (_, its) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        own.data = its.data.clone()  # other memory: a copy made by the patch would be stale
    assert torch.equal(model(hf_models.prompt()).logits, expected)
    assert (
        hf_models.served_calls(model.bfloat16()) == [hf_models.PROMPT[0] * hf_models.PROMPT[1]] * hf_models.MOE_LAYERS
    )


@torch.no_grad()
def test_hooks_that_wrap_forward_before_or_after():
    hooks = pytest.importorskip("accelerate.hooks")
    model = hf_outside.build("llama4")
    before = model.model.layers[0].feed_forward
    after = model.model.layers[1].feed_forward
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(before, Counting())
    warpdecode.hf.patch(model, strict=True)
    hooks.add_hook_to_module(after, Counting())
    assert len(hf_models.served_calls(model)) == 2 and calls == [before, after]
    warpdecode.hf.unpatch(model)
    assert not hf_models.served_calls(model) and len(calls) == 4
    hooks.remove_hook_from_module(before)
    hooks.remove_hook_from_module(after)
    assert (
        not hf_models.served_calls(model) and len(hf_models.served_calls(warpdecode.hf.patch(model, strict=True))) == 2
    )


@torch.no_grad()
@pytest.mark.parametrize(("family", "child"), [("llama4", "experts"), ("dbrx", "mlp")])
def test_hooks_within_what_is_replaced_are_not_overlooked(family, child):
    module, call = _built(family), _call(family)
    warpdecode.hf.patch(module)
    module(*call)
    seen = []
    hook = getattr(module, child).register_forward_hook(lambda *_: seen.append(1))
    match = f"{child} has hooks, which would not be called"
    with hf_models.counted_kernel_calls() as served:
        with pytest.warns(WarpDecodeFallbackWarning, match=match):
            module(*call)
        assert seen and not served and match in warpdecode.hf.explain(module)[0].reason
        hook.remove()
        module(*call)
    assert served[-1] == T  # after a probe of its own


def test_a_forward_on_the_instance_is_not_overlooked():
    model = hf_outside.build("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    own = experts.forward
    experts.forward = lambda *args: 1.0 * own(*args)
    reason = "its forward was replaced on the instance"
    assert reason in warpdecode.hf.explain(model)[0].reason
    with pytest.raises(WarpDecodeFallbackError, match=reason):
        warpdecode.hf.patch(model, strict=True)


@torch.no_grad()
@pytest.mark.parametrize("family", hf_outside.MODELS)
def test_compiled_without_a_graph_break(family, device):
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = warpdecode.hf.patch(hf_outside.build(family, dtype).to(device), strict=True)
    modules = [m for m in model.modules() if "_warpdecode_policy" in m.__dict__]
    assert len(modules) == hf_models.MOE_LAYERS
    call = (torch.randn(1, 5, 64).to(device, dtype),)
    if family != "llama4":
        ids = torch.rand(5, E).argsort(dim=1)[:, :K].contiguous()
        call = call[0][0], ids.to(device), torch.rand(5, K).to(device, dtype)
    for module in modules:
        expected = module(*call)
        with hf_models.counted_kernel_calls() as served:
            got = torch.compile(module, fullgraph=True, backend="aot_eager")(*call)
        assert served == [5]
        # The same kernels; what is compiled around them may round its steps in another order.
        hf_outside.assert_alike(got, expected)


@torch.no_grad()
def test_a_class_that_computes_something_else_is_handed_back():
    class ScaledExperts(hf_outside.class_of("step3p7", "Step3p7Experts")):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 1.5 * super().forward(hidden_states, top_k_index, top_k_weights)

    module = _built("step3p7")
    module.__class__ = ScaledExperts
    (row,) = warpdecode.hf.explain(module)
    assert "differs from the kernels' result on a probe (0.33 of it)" in row.reason
    call = _call("step3p7")
    expected = module(*call)
    with pytest.warns(WarpDecodeFallbackWarning, match="on a probe"):
        got = warpdecode.hf.patch(module)(*call)
    assert torch.equal(got, expected)


# What becomes of every class of experts without transformers' decorator, by its name; Aria's has one since 5.18.
SERVED = {"DbrxExperts", "Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts"}
HANDED_BACK = {"AriaExperts", "JetMoeParallelExperts", "NllbMoeExperts", "SwitchTransformersExperts"}
ALWAYS_DENSE = {"InklingSharedExperts"}  # shared experts: nothing is routed


def test_copies_have_the_class_of_their_original():
    model = warpdecode.hf.patch(hf_outside.build("longcat_flash"), strict=True)
    for twin, module in zip(copy.deepcopy(model).modules(), model.modules(), strict=True):
        assert type(twin) is type(module)


def test_no_other_class_of_experts_is_outside():
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for decorators, name in CLASS.findall(path.read_text(encoding="utf-8")):
            if "use_experts_implementation" not in decorators:
                found.add(name)
    assert len(found) >= 4
    assert found <= SERVED | HANDED_BACK | ALWAYS_DENSE
