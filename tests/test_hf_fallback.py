"""What the kernels cannot serve: it takes the model's own path, is said once, and raises under strict."""

import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import hf_models
import pytest
import torch
import warpdecode.hf
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning
from warpdecode.hf.gate import probe_gate

EXPERTS, HIDDEN, TOKENS = 8, 64, 5


def _layer(implementation: str = "grouped_mm", **config) -> torch.nn.Module:
    """One Qwen3-MoE experts module, with the config fields given."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    fields = {"hidden_size": HIDDEN, "moe_intermediate_size": 32, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    full = Qwen3MoeConfig(**fields | config)
    full._experts_implementation = implementation
    layer = Qwen3MoeExperts(full)
    torch.manual_seed(0)
    hf_models.randomise(layer)
    return layer.requires_grad_(False)


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    weights = torch.rand(TOKENS, 2, generator=generator)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype), ids, weights


# ---- calls that cannot be served, on layers that otherwise can


class _Subclass(torch.Tensor):
    """Any tensor class that is not torch's own: torchao's, DTensor."""


def _weights_need_gradients(layer, inputs):
    layer.down_proj.requires_grad_(True)


def _input_needs_gradients(layer, inputs):
    inputs[0].requires_grad_(True)


def _routing_needs_gradients(layer, inputs):
    inputs[2].requires_grad_(True)


def _weights_of_another_dtype(layer, inputs):
    layer.to(torch.bfloat16)


def _weights_in_float64(layer, inputs):
    layer.double()
    layer.config._experts_implementation = "batched_mm"  # torch's grouped_mm has no float64
    inputs[0], inputs[2] = inputs[0].double(), inputs[2].double()


def _routing_in_float64(layer, inputs):
    inputs[2] = inputs[2].double()


def _weights_of_two_dtypes(layer, inputs):
    layer.down_proj.data = layer.down_proj.data.to(torch.bfloat16)


def _weights_of_a_subclass(layer, inputs):
    layer.down_proj = torch.nn.Parameter(layer.down_proj.data.as_subclass(_Subclass), requires_grad=False)


def _inputs_of_a_subclass(layer, inputs):
    inputs[0] = inputs[0].as_subclass(_Subclass)


def _weights_not_contiguous(layer, inputs):
    layer.gate_up_proj.data = layer.gate_up_proj.data.transpose(1, 2).contiguous().transpose(1, 2)


def _weights_misaligned(layer, inputs):
    weight = layer.gate_up_proj.data
    layer.gate_up_proj.data = torch.empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)


def _hidden_size_of_60(layer, inputs):
    layer.gate_up_proj.data = layer.gate_up_proj.data[..., :60].contiguous()
    layer.down_proj.data = layer.down_proj.data[:, :60].contiguous()
    inputs[0] = inputs[0][:, :60].contiguous()


def _nothing(layer, inputs):
    pass


def _flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


CALLS = {
    "weights need gradients": (_weights_need_gradients, nullcontext, "gradients are needed.*down_proj requires grad"),
    "input needs gradients": (_input_needs_gradients, nullcontext, "gradients are needed.*hidden_states requires grad"),
    "routing needs gradients": (_routing_needs_gradients, nullcontext, "gradients are.*top_k_weights requires grad"),
    "hidden states of another dtype": (
        _weights_of_another_dtype,
        nullcontext,
        "hidden_states is torch.float32 on cpu and the weights torch.bfloat16 on cpu",
    ),
    "float64": (_weights_in_float64, nullcontext, "float64"),
    "float64 routing weights": (_routing_in_float64, nullcontext, "top_k_weights torch.float64"),
    "two dtypes": (_weights_of_two_dtypes, nullcontext, "gate_up_proj is torch.float32 on cpu and down_proj torch.b"),
    "weights of a subclass": (_weights_of_a_subclass, nullcontext, "down_proj is a _Subclass"),
    "inputs of a subclass": (_inputs_of_a_subclass, nullcontext, "tensors of class _Subclass"),
    "not contiguous": (_weights_not_contiguous, nullcontext, "gate_up_proj is not a contiguous strided tensor"),
    "H not a multiple of 8": (_hidden_size_of_60, nullcontext, "60"),
    "autocast": (
        _nothing,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "autocast to torch.bfloat16 is on and the weights are torch.float32",
    ),
    "a dispatch mode": (_nothing, _flop_counter, "TorchDispatchMode"),
}


@pytest.fixture(params=CALLS)
def call(request):
    """(a function that makes (layer, inputs), a context factory, the reason's pattern) of a call not served."""
    change, context, pattern = CALLS[request.param]

    def make():
        layer, inputs = _layer(), list(_inputs())
        change(layer, inputs)
        return layer, inputs

    return make, context, pattern


@pytest.mark.filterwarnings("ignore::warpdecode.hf.WarpDecodeFallbackWarning")
def test_such_a_call_takes_the_model_s_own_path(call):
    make, context, _ = call
    layer, inputs = make()
    with context():
        expected = layer(*inputs)
    warpdecode.hf.patch(layer)
    with context(), hf_models.counted_kernel_calls() as served:
        got = layer(*inputs)
    assert not served
    assert torch.equal(got, expected) and got.requires_grad == expected.requires_grad


def test_its_reason_is_said_once_per_model(call):
    make, context, pattern = call
    for _ in range(2):  # the second model is told as well, although the sentence is the same
        inputs = make()[1]
        model = torch.nn.ModuleList([make()[0], make()[0]])
        with pytest.warns(WarpDecodeFallbackWarning, match=pattern) as said:
            warpdecode.hf.patch(model)
            for _ in range(2):
                for module in model:
                    with context():
                        module(*inputs)
        assert len(said) == 1
        assert "Qwen3MoeExperts" in str(said[0].message)


def test_a_second_model_is_heard_under_python_s_own_filter():
    # Which shows a sentence once per place, and so would take the second model's for the first's.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            layer = warpdecode.hf.patch(_layer().requires_grad_(True))
            layer(*_inputs())
            layer(*_inputs())
    assert [w.category for w in said] == [WarpDecodeFallbackWarning] * 2


def test_it_raises_under_strict(call):
    make, context, pattern = call
    layer, inputs = make()
    healthy = _layer()
    model = torch.nn.ModuleList([healthy])
    warpdecode.hf.patch(model, strict=True)
    model.append(layer)
    layer.__dict__["config"] = healthy.config  # as if it had become so after patching
    with context(), hf_models.counted_kernel_calls() as served, pytest.raises(WarpDecodeFallbackError, match=pattern):
        layer(*inputs)
    assert not served and issubclass(WarpDecodeFallbackError, RuntimeError)


def test_gradients_are_those_of_the_model_s_own_path():
    layer = _layer("eager").requires_grad_(True)
    hidden, ids, weights = _inputs()

    def gradient():
        layer.zero_grad()
        layer(hidden, ids, weights).square().sum().backward()
        return layer.gate_up_proj.grad.clone()

    expected = gradient()
    warpdecode.hf.patch(layer)
    with pytest.warns(WarpDecodeFallbackWarning):
        assert torch.equal(gradient(), expected)
    with torch.no_grad(), hf_models.counted_kernel_calls() as served:
        layer(hidden, ids, weights)
    assert served


def test_forward_mode_differentiation_and_function_transforms():
    layer = warpdecode.hf.patch(_layer("eager"), strict=True)
    hidden, ids, weights = _inputs()
    for transform in (
        lambda f: torch.func.jvp(f, (hidden,), (torch.ones_like(hidden),)),
        lambda f: torch.func.vmap(f)(hidden[None]),
    ):
        with pytest.raises(WarpDecodeFallbackError, match=r"torch\.func"), torch.no_grad():
            transform(lambda h: layer(h, ids, weights))


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        layer = _layer()
    with pytest.raises(WarpDecodeFallbackError, match="gate_up_proj is on the meta device"):
        warpdecode.hf.patch(layer, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match="meta device"):
        warpdecode.hf.patch(layer)
    layer.to_empty(device="cpu")
    hf_models.randomise(layer)
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        layer(*_inputs())  # once they are loaded
    assert served


# ---- compilers and tracers


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("clean_dynamo")
@torch.no_grad()
@pytest.mark.parametrize("how", ["patched", "by name"])
def test_torch_compile_gets_the_model_s_own_path_without_a_graph_break(how):
    warpdecode.hf.register()
    expected = _layer()(*_inputs())
    layer = warpdecode.hf.patch(_layer()) if how == "patched" else _layer("warp_decode")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.warns(WarpDecodeFallbackWarning, match="torch.compile") if how == "patched" else nullcontext():
        got = compiled(*_inputs())
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        assert torch.equal(compiled(*_inputs()), got)
        assert not served
        layer(*_inputs())  # the same layer, not compiled
        assert served
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("clean_dynamo")
@torch.no_grad()
def test_torch_compile_raises_under_strict():
    compiled = torch.compile(warpdecode.hf.patch(_layer(), strict=True), backend="eager")
    with pytest.raises(RuntimeError, match=r"Qwen3MoeExperts cannot be served: torch\.compile"):
        compiled(*_inputs())


@torch.no_grad()
def test_torch_jit_trace_records_the_model_s_own_path():
    layer = warpdecode.hf.patch(_layer())
    hidden, ids, weights = _inputs()
    with pytest.warns(WarpDecodeFallbackWarning, match="torch.jit"):
        traced = torch.jit.trace(lambda h: layer(h, ids, weights), hidden, check_trace=False)
    other = hidden.roll(1, 0) * 2
    assert torch.allclose(traced(other), layer(other, ids, weights), rtol=1e-4, atol=1e-4)


# ---- layers that can never be served


def _raises_when_patched(model: torch.nn.Module, pattern: str) -> None:
    before = {name: (id(m.__dict__.get("config")), set(m.__dict__)) for name, m in model.named_modules()}
    with pytest.raises(WarpDecodeFallbackError, match=pattern):
        warpdecode.hf.patch(model, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match=pattern) as said:
        assert warpdecode.hf.patch(model) is model
    assert len(said) == 1
    assert before == {name: (id(m.__dict__.get("config")), set(m.__dict__)) for name, m in model.named_modules()}


@pytest.mark.parametrize(
    ("flag", "value", "pattern"),
    [
        ("is_transposed", True, "stored transposed"),
        ("is_concatenated", False, "interleaved"),
        ("has_bias", True, "biases"),
        ("has_gate", False, "no gate projection"),
        ("has_post_expert_norm", True, "normalises each expert's output"),
    ],
)
def test_another_layout(flag, value, pattern):
    layer = _layer()
    setattr(layer, flag, value)
    _raises_when_patched(layer, pattern)


def test_gpt_oss_as_it_is():
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {"num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 32, "intermediate_size": 32}
    config = GptOssConfig(**fields, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=50)
    model = GptOssForCausalLM(config)
    _raises_when_patched(model, "none of the 2 .*GptOssExperts: its weights are stored transposed")
    warpdecode.hf.register()
    model.set_experts_implementation("warp_decode")
    with pytest.warns(WarpDecodeFallbackWarning, match="GptOssExperts.*transposed"), torch.no_grad():
        model(torch.arange(6)[None])


def test_a_class_outside_the_experts_interface():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=1)
    _raises_when_patched(
        Llama4TextMoe(config), "Llama4TextExperts: its class does not use transformers' experts interf"
    )


def test_a_model_without_experts():
    _raises_when_patched(torch.nn.Linear(8, 8), "Linear has no Mixture-of-Experts layers")


def test_transformers_fp8_experts():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, replace_with_fp8_linear

    model = hf_models.build("qwen3_moe", implementation="grouped_mm")
    quantization = SimpleNamespace(
        dequantize=False, weight_block_size=(32, 32), activation_scheme="dynamic", scale_fmt="float", expert_dtype="fp8"
    )
    replace_with_fp8_linear(model, quantization_config=quantization)
    experts = hf_models.experts_modules(model)[0]
    assert type(experts).__name__ == "FP8Experts"
    _raises_when_patched(model, "FP8Experts: its weights are block-scaled FP8")
    # By name the FP8 experts have a registry of their own; without our name in it they would end in a KeyError.
    warpdecode.hf.register()
    experts.config._experts_implementation = "warp_decode"
    ran = []
    own = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"]
    ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] = lambda self, *inputs: ran.append(self)  # Triton and a GPU otherwise
    try:
        with pytest.warns(WarpDecodeFallbackWarning, match=r"FP8Experts takes its own path \(grouped_mm\)"):
            experts(*_inputs())
    finally:
        ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"] = own
    assert ran == [experts]


def test_a_model_that_can_be_served_in_part():
    model = torch.nn.ModuleList([_layer(), _layer(hidden_act="relu")])
    with pytest.raises(WarpDecodeFallbackError, match="its gate computes neither"):
        warpdecode.hf.patch(model, strict=True)
    with hf_models.counted_kernel_calls() as served:
        for module in model:
            module(*_inputs())
        assert not served, "a strict patch that raised has patched something"
        with pytest.warns(WarpDecodeFallbackWarning, match="its gate computes neither"):
            warpdecode.hf.patch(model)
        with hf_models.no_fallback():
            for module in model:
                module(*_inputs())
    assert len(served) == 1


# ---- gates


def _gate(function, act_fn=None):
    holder = torch.nn.Module()
    holder.act_fn = act_fn
    holder._apply_gate = lambda gate_up: function(holder, gate_up)
    return probe_gate(holder, torch.device("cpu"))


RECOGNISED = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_of_transformers(name):
    try:
        activation = ACT2FN[name]
    except Exception as error:  # some need a GPU or a package
        pytest.skip(f"{name}: {error}")
    gate = _gate(_default_apply_gate, activation)
    assert gate.activation == RECOGNISED.get(name)
    assert (gate.activation is None) == (gate.reason is not None)


def test_functions_and_torch_s_own_modules():
    functional = torch.nn.functional
    assert _gate(_default_apply_gate, functional.silu).activation == "silu"
    assert _gate(_default_apply_gate, torch.nn.SiLU()).activation == "silu"
    assert _gate(_default_apply_gate, torch.nn.GELU(approximate="tanh")).activation == "gelu_tanh"
    assert _gate(_default_apply_gate, torch.nn.GELU()).activation is None
    assert _gate(_default_apply_gate, functional.gelu).activation is None


def _clamped(limit):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return gate


def _clamped_gate(limit):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up

    return gate


def _swapped(self, gate_up):
    up, gate = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _interleaved(self, gate_up):
    return torch.nn.functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


def _up_plus_one(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * (up + 1)


def _clamped_up(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up.clamp(-10, 10)


def _not_a_number(self, gate_up):
    return torch.nn.functional.silu(gate_up.chunk(2, -1)[0]) * float("nan")


def _raising(self, gate_up):
    raise NotImplementedError("no such gate")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_clamped(7.0), "neither"),
        (_clamped(10.0), "neither"),
        (_clamped(1e4), "neither"),
        (_clamped_gate(7.0), "neither"),
        (_clamped_gate(1e4), "neither"),
        (_swapped, "neither"),
        (_interleaved, "neither"),
        (_up_plus_one, "neither"),
        (_clamped_up, "neither"),
        (_not_a_number, "neither"),
        (_raising, r"could not be probed \(NotImplementedError: no such gate\)"),
        (lambda self, gate_up: gate_up, "to "),
    ],
)
def test_gates_that_compute_something_else(function, reason):
    gate = _gate(function)
    assert gate.activation is None
    assert re.search(reason, gate.reason)


def test_a_clamp_without_a_limit_is_recognised():
    assert _gate(_clamped(float("inf"))).activation == "silu"


def test_the_gate_is_looked_at_as_computed_whatever_the_mode():
    act = torch.nn.SiLU()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert _gate(_default_apply_gate, act).activation == "silu"
    with torch.inference_mode():
        assert _gate(_default_apply_gate, act).activation == "silu"
