"""The FP64 reference that the tests judge by. It imports nothing of warpdecode and is meant to be right by reading."""

import math

import numpy as np

SQRT_2_OVER_PI = np.sqrt(2.0 / np.pi)


def silu(g):
    """g / (1 + exp(-g)), without overflow."""
    return g * 0.5 * (1.0 + np.tanh(0.5 * g))


def gelu_tanh(g):
    """https://arxiv.org/abs/1606.08415, section 2, the tanh form."""
    return 0.5 * g * (1.0 + np.tanh(SQRT_2_OVER_PI * (g + 0.044715 * g**3)))


def gelu(g):
    """The same page, the form it is defined by."""
    return 0.5 * g * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(g / np.sqrt(2.0)))


def relu(g):
    """max(g, 0)"""
    return np.maximum(g, 0.0)


def relu2(g):
    """https://arxiv.org/abs/2109.08668, section 3: its square."""
    return relu(g) ** 2


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu, "relu": relu, "relu2": relu2}


def halves(array, is_interleaved):
    """Gates and ups of the last axis."""
    if is_interleaved:
        return array[..., 0::2], array[..., 1::2]
    return np.split(array, 2, axis=-1)


def gated(gate, up, activation="silu", alpha=None, limit=None, clamp_after_activation=False, up_offset=0.0):
    """The intermediate of gates and ups (up None: there is none)."""
    limit = np.inf if limit is None else limit
    if not clamp_after_activation:
        gate = np.minimum(gate, limit)
    value = silu(alpha * gate) / alpha if alpha is not None else ACTIVATIONS[activation](gate)
    if clamp_after_activation:
        value = np.minimum(value, limit)
    return value if up is None else value * (np.clip(up, -limit, limit) + up_offset)


def moe(
    hidden_states,
    topk_ids,
    topk_weights,
    gate_up_proj,
    down_proj,
    activation="silu",
    *,
    is_transposed=False,
    is_interleaved=False,
    up_proj=None,
    has_gate=True,
    gate_up_bias=None,
    up_bias=None,
    down_bias=None,
    weight_on_input=False,
    **gate_properties,
):
    """One MoE layer's experts in float64; all arguments NumPy arrays that convert to float64 (ids: to int64).

    The keywords are those of warpdecode.Experts, and what transformers' classes of these layouts compute.
    """
    x = np.asarray(hidden_states, np.float64)
    weights = np.asarray(topk_weights, np.float64)
    out = np.zeros_like(x)

    def project(states, matrices, biases, expert, transposed):
        matrix = np.asarray(matrices[expert], np.float64)
        bias = 0.0 if biases is None else np.asarray(biases[expert], np.float64)
        return states @ (matrix if transposed else matrix.T) + bias

    for expert in range(len(gate_up_proj)):  # by expert, so that each one's weights are converted once
        tokens, slots = np.nonzero(np.asarray(topk_ids) == expert)
        if not len(tokens):
            continue
        weight = weights[tokens, slots, None]
        states = x[tokens] * weight if weight_on_input else x[tokens]
        rows = project(states, gate_up_proj, gate_up_bias, expert, is_transposed is True)
        if not has_gate:
            gate, up = rows, None
        elif up_proj is not None:
            gate, up = rows, project(states, up_proj, up_bias, expert, is_transposed is True)
        else:
            gate, up = halves(rows, is_interleaved)
        inter = gated(gate, up, activation, **gate_properties)
        routes = project(inter, down_proj, down_bias, expert, bool(is_transposed))
        # add.at: a token may name an expert twice
        np.add.at(out, tokens, routes if weight_on_input else weight * routes)
    return out
