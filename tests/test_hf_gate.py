"""Recognising a layer's gate by what it computes."""

import re

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from warpdecode.hf.gate import probe_gate


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
