"""What is changed on a module after the patch, besides its weights: followed, or handed back, eager and compiled."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

import hf_models
import hf_outside
import test_hf_outside
import test_hf_separate
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

transformers_moe = pytest.importorskip("transformers.integrations.moe")


class _Gated(nn.Module):
    """A class of the interface whose gate has a number, and a module in it."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.scale = 8, 1.0
        self.gate_up_proj = nn.Parameter(torch.randn(8, 64, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(8, 64, 32) / 6)
        self.act_fn, self.dropout = nn.SiLU(), nn.Dropout(0.5)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.dropout(self.act_fn(gate) * up * self.scale)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


_Gated = transformers_moe.use_experts_implementation(_Gated)


def _gated(**parts) -> nn.Module:
    layer = _Gated(hf_models.experts_layer("grouped_mm").config)
    for name, value in parts.items():
        setattr(layer, name, value)
    return layer.requires_grad_(False).eval()


def _layer() -> nn.Module:
    return hf_models.experts_layer("grouped_mm").eval()


def _leaky() -> nn.Module:
    layer = _layer()
    layer.act_fn = nn.LeakyReLU(0.0)
    return layer


def _step() -> nn.Module:
    return test_hf_outside._built("step3p7")


def _block() -> nn.Module:
    return test_hf_separate._built(test_hf_separate._HasMoe, torch.float32, "cpu")


def _functional() -> nn.Module:
    block = _block()
    for expert in block.experts:
        del expert.act_fn
        expert.act_fn = functional.silu
    return block


def _each(name, value):
    def change(block):
        for expert in block.experts:
            setattr(expert, name, value)

    return change


def _tripled(module) -> None:
    own = type(module).forward
    module.forward = lambda *args: 3 * own(module, *args)


def _tripled_gate(layer) -> None:
    layer._apply_gate = types.MethodType(lambda self, gate_up: 3 * self.act_fn(gate_up.chunk(2, -1)[0]), layer)


def _call(module) -> tuple:
    generator = torch.Generator().manual_seed(7)
    if isinstance(module, (_Gated, type(_layer()))):
        return hf_models.layer_inputs()
    hidden = 72
    if hasattr(module, "router") or hasattr(module, "moe"):
        return (torch.randn(2, 9, hidden, generator=generator),)
    x = torch.randn(11, hidden, generator=generator)
    ids = torch.rand(11, 8, generator=generator).argsort(dim=1)[:, :3].contiguous()
    x = x.view(1, 11, hidden) if hasattr(module, "mlp") else x
    return x, ids, torch.rand(11, 3, generator=generator)


# what is built, what is changed, whether the kernels follow (None: they hand back)
CHANGES = {
    "an activation": (_layer, lambda m: setattr(m, "act_fn", nn.ReLU()), True),
    "an activation's number": (_leaky, lambda m: setattr(m.act_fn, "negative_slope", 0.5), False),
    "a hook on the activation": (_layer, lambda m: m.act_fn.register_forward_hook(lambda *call: 0.5 * call[2]), False),
    "a forward of the activation": (_layer, lambda m: setattr(m.act_fn, "forward", torch.relu), False),
    "a gate on the instance": (_layer, _tripled_gate, False),
    "a number of the gate": (_gated, lambda m: setattr(m, "scale", 0.5), False),
    "dropout in the gate": (_gated, lambda m: m.train(), False),
    "a limit": (_step, lambda m: setattr(m, "limit", 1.5), True),
    "an activation outside": (_step, lambda m: setattr(m, "act_fn", nn.ReLU()), True),
    "one expert's forward": (_block, lambda m: _tripled(m.experts[3]), False),
    "one Linear's forward": (_block, lambda m: _tripled(m.experts[3].up_proj), False),
    "the function of all experts": (_functional, _each("act_fn", functional.relu), True),
    "the activation of all experts": (_block, _each("act_fn", nn.ReLU()), True),
    "one Linear's class": (
        _block,
        lambda m: setattr(m.experts[5].up_proj, "__class__", test_hf_separate._Rounds),
        False,
    ),
    "a hook on one Linear": (_block, lambda m: test_hf_separate._hook(m.experts[3].up_proj), False),
    "the forward of Llama 4's experts": (
        lambda: test_hf_outside._built("llama4"),
        lambda m: _tripled(m.experts),
        False,
    ),
    "the forward of DBRX's experts": (lambda: test_hf_outside._built("dbrx"), lambda m: _doubled_mlp(m.mlp), False),
}
# What is put on an instance beside what it had.
ON_INSTANCES = {
    name for name in CHANGES if "forward" in name or name in ("a gate on the instance", "one Linear's class")
}


def _doubled_mlp(mlp) -> None:
    own = type(mlp).forward
    mlp.forward = lambda *args, **kwargs: 2 * own(mlp, *args, **kwargs)


@torch.no_grad()
def _own(build, change, call) -> torch.Tensor:
    torch.manual_seed(0)
    module = build()
    change(module)
    torch.manual_seed(1)
    return hf_outside.output(module(*call))


@torch.no_grad()
@pytest.mark.parametrize("how", ["eager", "compiled", "compiled before the change"])
@pytest.mark.parametrize("name", CHANGES)
def test_it_is_followed_or_handed_back(name, how):
    build, change, followed = CHANGES[name]
    if "hook" in name and (how == "compiled before the change" or ("Linear" in name and how == "compiled")):
        pytest.skip("torch.compile looks at no hook that comes later, nor at that of one expert of many")
    if torch.__version__ < (2, 13) and how == "compiled before the change" and name in ON_INSTANCES:
        pytest.skip("this torch guards nothing that a module's attributes lack")
    if "dropout" in name and how != "eager":
        pytest.skip("other random numbers when compiled")
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = warpdecode.hf.patch(build(), strict=True)
    call = _call(module)
    run = module if how == "eager" else torch.compile(module, backend="aot_eager")
    if how != "compiled":
        run(*call)
    warpdecode.hf.patch(module)  # lenient
    change(module)
    expected = _own(build, change, call)
    with hf_models.counted_kernel_calls() as served:
        torch.manual_seed(1)
        if followed:
            with hf_models.no_fallback():
                got = run(*call)
        else:
            with pytest.warns(WarpDecodeFallbackWarning):
                got = run(*call)
    tokens = call[0].numel() // call[0].shape[-1]
    assert served.count(tokens) == followed  # the others are probes
    torch.testing.assert_close(hf_outside.output(got), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_gpt_oss_limit_and_alpha_are_followed():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    layer = GptOssExperts(config).requires_grad_(False).eval()
    for parameter in layer.parameters():
        parameter.normal_()
    warpdecode.hf.patch(layer, strict=True)
    for name, value in (("limit", 1.0), ("alpha", 0.3)):
        layer(*hf_models.layer_inputs())
        setattr(layer, name, value)
        got = layer(*hf_models.layer_inputs())
        own = warpdecode.hf.unpatch(copy.deepcopy(layer))(*hf_models.layer_inputs())
        torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-3)


class _Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class _Counted(nn.SiLU):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("act_fn", _Learned(), "it has act_fn.beta, which the kernels would not read"),
        ("act_fn", _Counted(), "it has act_fn.calls, which"),
        ("scale", nn.Parameter(torch.ones(())), "it has scale, which"),
    ],
)
def test_what_is_learned_besides_the_experts_weights_is_not_taken_for_a_constant(name, value, reason):
    layer = _gated()
    if name == "scale":
        del layer.scale
    setattr(layer, name, value)
    with pytest.raises(WarpDecodeFallbackError, match=reason):
        warpdecode.hf.patch(layer, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match=reason):
        warpdecode.hf.patch(layer)


@torch.no_grad()
def test_dropout_is_served_in_eval_mode_after_a_patch_in_training_mode():
    layer = _gated().train()
    before = torch.get_rng_state()
    with pytest.warns(WarpDecodeFallbackWarning, match="in training mode; it can be served in eval mode"):
        warpdecode.hf.patch(layer)
    assert torch.equal(torch.get_rng_state(), before), "patching took random numbers"
    layer.eval()
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        layer(*hf_models.layer_inputs())
    assert served


@torch.no_grad()
def test_train_and_eval_mode_by_turns_are_looked_at_once_each():
    layer, calls = _layer(), []

    def counting(self, gate_up):
        calls.append(1)
        return transformers_moe._default_apply_gate(self, gate_up)

    layer._apply_gate = types.MethodType(counting, layer)
    warpdecode.hf.patch(layer, strict=True)
    for _ in range(4):
        for mode in (True, False):
            layer.train(mode)(*hf_models.layer_inputs())
    assert len(calls) == 2
