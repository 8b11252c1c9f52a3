"""The FP64 reference that the tests judge by. It imports nothing of warpdecode and is meant to be right by reading."""

import numpy as np

SQRT_2_OVER_PI = np.sqrt(2.0 / np.pi)


def silu(g):
    """g / (1 + exp(-g)), without overflow."""
    return g * 0.5 * (1.0 + np.tanh(0.5 * g))


def gelu_tanh(g):
    """https://arxiv.org/abs/1606.08415, section 2, the tanh form."""
    return 0.5 * g * (1.0 + np.tanh(SQRT_2_OVER_PI * (g + 0.044715 * g**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def moe(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, activation="silu"):
    """One MoE layer's experts in float64; all arguments NumPy arrays that convert to float64 (ids: to int64)."""
    x = np.asarray(hidden_states, np.float64)
    weights = np.asarray(topk_weights, np.float64)
    out = np.zeros_like(x)
    half = gate_up_proj.shape[1] // 2
    for expert in range(gate_up_proj.shape[0]):  # by expert, so that each one's weights are converted once
        tokens, slots = np.nonzero(np.asarray(topk_ids) == expert)
        if not len(tokens):
            continue
        both = x[tokens] @ np.asarray(gate_up_proj[expert], np.float64).T
        inter = ACTIVATIONS[activation](both[:, :half]) * both[:, half:]
        routes = inter @ np.asarray(down_proj[expert], np.float64).T
        np.add.at(out, tokens, weights[tokens, slots, None] * routes)  # add.at: a token may name an expert twice
    return out
