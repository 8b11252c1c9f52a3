"""What the kernels cannot serve: it takes the model's own path, is said once, and raises under strict."""

import warnings
from contextlib import nullcontext

import pytest
import torch

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning


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
    layer.gate_up_proj.data = weight.new_empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)


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
        layer, inputs = hf_models.experts_layer(), list(hf_models.layer_inputs())
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
            layer = warpdecode.hf.patch(hf_models.experts_layer().requires_grad_(True))
            layer(*hf_models.layer_inputs())
            layer(*hf_models.layer_inputs())
    assert [w.category for w in said] == [WarpDecodeFallbackWarning] * 2


def test_it_raises_under_strict(call):
    make, context, pattern = call
    layer, inputs = make()
    healthy = hf_models.experts_layer()
    model = torch.nn.ModuleList([healthy])
    warpdecode.hf.patch(model, strict=True)
    model.append(layer)
    layer.__dict__["config"] = healthy.config  # as if it had become so after patching
    with context(), hf_models.counted_kernel_calls() as served, pytest.raises(WarpDecodeFallbackError, match=pattern):
        layer(*inputs)
    assert not served and issubclass(WarpDecodeFallbackError, RuntimeError)


def test_gradients_are_those_of_the_model_s_own_path():
    layer = hf_models.experts_layer("eager").requires_grad_(True)
    hidden, ids, weights = hf_models.layer_inputs()

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
    layer = warpdecode.hf.patch(hf_models.experts_layer("eager"), strict=True)
    hidden, ids, weights = hf_models.layer_inputs()
    for transform in (
        lambda f: torch.func.jvp(f, (hidden,), (torch.ones_like(hidden),)),
        lambda f: torch.func.vmap(f)(hidden[None]),
    ):
        with pytest.raises(WarpDecodeFallbackError, match=r"torch\.func"), torch.no_grad():
            transform(lambda h: layer(h, ids, weights))


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        layer = hf_models.experts_layer()
    with pytest.raises(WarpDecodeFallbackError, match="gate_up_proj is on the meta device"):
        warpdecode.hf.patch(layer, strict=True)
    with pytest.warns(WarpDecodeFallbackWarning, match="meta device"):
        warpdecode.hf.patch(layer)
    layer.to_empty(device="cpu")
    hf_models.randomise(layer)
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        layer(*hf_models.layer_inputs())  # once they are loaded
    assert served


def _weights_in_float32(layer, inputs):
    layer.float()
    inputs[0] = inputs[0].float()


GPU_CALLS = {
    "weights need gradients": (_weights_need_gradients, nullcontext, "gradients are needed.*down_proj requires grad"),
    "input needs gradients": (_input_needs_gradients, nullcontext, "gradients are needed.*hidden_states requires grad"),
    "float32": (_weights_in_float32, nullcontext, r"dtype was float32.*\(float32: CPU only\)"),
    "float64 routing weights": (_routing_in_float64, nullcontext, "top_k_weights torch.float64"),
    "misaligned": (_weights_misaligned, nullcontext, "gate_up_proj.*multiple of 16"),
    "autocast": (
        _nothing,
        lambda: torch.autocast("cuda", dtype=torch.float16),
        "autocast to torch.float16 is on and the weights are torch.bfloat16",
    ),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", GPU_CALLS)
def test_what_is_not_served_on_the_gpu_takes_the_model_s_own_path(name):
    change, context, pattern = GPU_CALLS[name]
    layer = hf_models.experts_layer("eager").to("cuda", torch.bfloat16)
    inputs = [t.cuda() for t in hf_models.layer_inputs(dtype=torch.bfloat16)]
    change(layer, inputs)
    with context():
        expected = layer(*inputs)
    with pytest.warns(WarpDecodeFallbackWarning, match=pattern):
        warpdecode.hf.patch(layer)
        with context(), hf_models.counted_kernel_calls() as served:
            got = layer(*inputs)
    assert not served
    assert torch.equal(got, expected) and got.requires_grad == expected.requires_grad
    with pytest.raises(WarpDecodeFallbackError, match=pattern), context():
        warpdecode.hf.patch(layer, strict=True)(*inputs)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_hidden_states_of_another_dtype_or_device_are_not_read_as_the_weights_on_the_gpu():
    # The model's own path refuses them, too; what must not happen is an answer.
    layer = warpdecode.hf.patch(hf_models.experts_layer("eager").to("cuda", torch.bfloat16))
    inputs = [t.cuda() for t in hf_models.layer_inputs(dtype=torch.bfloat16)]
    for hidden in (inputs[0].half(), inputs[0].cpu()):
        said = pytest.warns(WarpDecodeFallbackWarning, match="hidden_states is torch.*they must be the same")
        with hf_models.counted_kernel_calls() as served, said, pytest.raises(RuntimeError):
            layer(hidden, *inputs[1:])
        assert not served
