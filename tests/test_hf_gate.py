"""Recognising a layer's gate by what it computes."""

import math
import re

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from warpdecode.hf.forms import INTERFACE
from warpdecode.hf.gate import probe_gate


def _gate(function, act_fn=None, **attributes):
    holder = torch.nn.Module()
    holder.act_fn = act_fn
    holder._apply_gate = lambda gate_up: function(holder, gate_up)
    for name, value in attributes.items():
        setattr(holder, name, value)
    return probe_gate(INTERFACE.gate(holder), torch.device("cpu"))


RECOGNISED = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "silu",
}
PARAMETERS = {"quick_gelu": {"alpha": 1.702}}


@pytest.mark.parametrize("has_gate", [True, False], ids=["gated", "without a gate"])
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_of_transformers(name, has_gate):
    try:
        activation = ACT2FN[name]
    except Exception as error:  # some need a GPU or a package
        pytest.skip(f"{name}: {error}")
    gate = _gate(_default_apply_gate, activation, has_gate=has_gate)
    if name not in RECOGNISED:
        assert gate.arguments is None and gate.reason
        return
    assert gate.arguments == {"activation": RECOGNISED[name], **PARAMETERS.get(name, {})}
    assert gate.reason is None


def test_functions_and_torch_s_own_modules():
    functional = torch.nn.functional
    for act_fn, name in [
        (functional.silu, "silu"),
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.GELU(), "gelu"),
        (functional.gelu, "gelu"),
        (torch.nn.ReLU(), "relu"),
    ]:
        assert _gate(_default_apply_gate, act_fn).arguments == {"activation": name}


def _clamped(limit, activation=torch.nn.functional.silu):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return activation(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return gate


def _clamped_after(limit, activation):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return activation(gate).clamp(max=limit) * up.clamp(-limit, limit)

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


def _clamped_up(self, gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up.clamp(-10, 10)


def _not_a_number(self, gate_up):
    return torch.nn.functional.silu(gate_up.chunk(2, -1)[0]) * float("nan")


def _raising(self, gate_up):
    raise NotImplementedError("no such gate")


def _swiglu(alpha, limit):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    return gate


@pytest.mark.parametrize("limit", [1.5, 7.0, 10.0, 1e4])
def test_a_limit_is_read_off_the_gate(limit):
    assert _gate(_clamped(limit)).arguments == {"activation": "silu", "limit": limit}


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu", "relu2", "silu"])
def test_every_activation_is_recognised_with_a_limit(name):
    # DeepSeek-V4 clamps whatever activation its config names.
    activation, found = ACT2FN[name], {"activation": RECOGNISED[name], "limit": 1.5}
    assert _gate(_clamped(1.5, activation)).arguments == found
    after = _gate(_clamped_after(1.5, activation)).arguments
    assert after == found | (
        {} if name == "relu" else {"clamp_after_activation": True}
    )  # which does not tell them apart


@pytest.mark.parametrize("limit", [1.5, 7.0, 12.5])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.702])
def test_alpha_and_limit_are_read_off_the_gate(alpha, limit):
    expected = {"activation": "silu", "up_offset": 1.0, "alpha": alpha}
    assert _gate(_swiglu(alpha, limit)).arguments == expected | {"limit": limit}
    assert _gate(_swiglu(alpha, math.inf)).arguments == expected


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_clamped_gate(7.0), "none of"),
        (_clamped_gate(1e4), "none of"),
        (_swapped, "none of"),
        (_interleaved, "none of"),
        (_clamped_up, "none of"),
        (_not_a_number, "none of"),
        (_raising, r"could not be probed \(NotImplementedError: no such gate\)"),
        (lambda self, gate_up: gate_up, "to "),
    ],
)
def test_gates_that_compute_something_else(function, reason):
    gate = _gate(function)
    assert gate.arguments is None
    assert re.search(reason, gate.reason)


def test_interleaved_columns_are_given_interleaved():
    silu = torch.nn.functional.silu
    assert _gate(_interleaved, is_concatenated=False).arguments == {"activation": "silu"}
    assert _gate(_default_apply_gate, silu, is_concatenated=False).arguments is None


def test_a_clamp_without_a_limit_is_recognised():
    assert _gate(_clamped(float("inf"))).arguments == {"activation": "silu"}


def test_the_gate_is_looked_at_as_computed_whatever_the_mode():
    act = torch.nn.SiLU()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert _gate(_default_apply_gate, act).arguments == {"activation": "silu"}
    with torch.inference_mode():
        assert _gate(_default_apply_gate, act).arguments == {"activation": "silu"}
