"""Layers for test_layouts.py: drawn once in the standard form, then stored in any layout."""

from dataclasses import dataclass, fields, replace

import torch

import reference
import warpdecode

# What Experts takes for each family's gate (tests/reference.py computes the same).
GATES = {
    "silu": {},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "swish": {"alpha": 1.702},
    "deepseek_v4": {"limit": 0.75},
    "gpt_oss": {"alpha": 1.702, "limit": 0.75, "up_offset": 1.0},
    "step3": {"limit": 0.75, "clamp_after_activation": True},
    "gelu, clamped": {"activation": "gelu", "limit": 0.5},
    "no gate, relu2": {"activation": "relu2", "has_gate": False},
    "no gate, gelu": {"activation": "gelu", "has_gate": False},
    "no gate, silu": {"has_gate": False},
}

LAYOUTS = (
    "standard",
    "transposed",
    "down transposed",
    "interleaved",
    "transposed, interleaved",
    "separate",
    "separate, transposed",
    "pointers",
    "pointers, transposed, interleaved",
    "pointers, separate",
)


@dataclass
class Parts:
    """A layer with gate and up apart, as rows; up is None where there is no gate."""

    gate: torch.Tensor
    up: torch.Tensor | None
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def to(self, device):
        """The same layer on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: None if t is None else t.to(device) for name, t in moved.items()})


def draw_parts(experts, hidden, intermediate, dtype, seed=0, has_gate=True, bias_dtype=None):
    """A fresh random layer, gate and up of order 1. bias_dtype: None for no biases."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale, of=dtype):
        return (torch.randn(shape, generator=generator) * scale).to(of)

    parts = Parts(
        draw(experts, intermediate, hidden, scale=hidden**-0.5),
        draw(experts, intermediate, hidden, scale=hidden**-0.5) if has_gate else None,
        draw(experts, hidden, intermediate, scale=intermediate**-0.5),
    )
    if bias_dtype is not None:
        parts.gate_bias = draw(experts, intermediate, scale=0.5, of=bias_dtype)
        parts.up_bias = draw(experts, intermediate, scale=0.5, of=bias_dtype) if has_gate else None
        parts.down_bias = draw(experts, hidden, scale=0.5, of=bias_dtype)
    return parts


def served_without_gate(layout):
    """Whether a layout says something of a layer that has no gate."""
    return "interleaved" not in layout and "separate" not in layout


def stored(parts, layout="standard"):
    """(gate_up_proj, down_proj, keywords) of warpdecode.Experts for a layer in a layout: the same numbers."""
    interleaved, separate = "interleaved" in layout, "separate" in layout
    transposed = "down" if "down transposed" in layout else "transposed" in layout

    def both(gate, up):
        if gate is None or up is None or separate:
            return gate
        return torch.stack([gate, up], dim=2).flatten(1, 2) if interleaved else torch.cat([gate, up], dim=1)

    def matrix(rows, is_transposed):
        return rows if rows is None else (rows.transpose(1, 2) if is_transposed else rows).contiguous()

    arrays = {
        "gate_up_proj": matrix(both(parts.gate, parts.up), transposed is True),
        "down_proj": matrix(parts.down, bool(transposed)),
        "up_proj": matrix(parts.up, transposed is True) if separate else None,
        "gate_up_bias": both(parts.gate_bias, parts.up_bias),
        "up_bias": parts.up_bias if separate else None,
        "down_bias": parts.down_bias,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if "pointers" in layout:  # each in memory of its own
        arrays = {name: [expert.clone() for expert in array] for name, array in arrays.items()}
    keywords = {"is_transposed": transposed, "is_interleaved": interleaved, "has_gate": parts.up is not None}
    return arrays.pop("gate_up_proj"), arrays.pop("down_proj"), {**arrays, **keywords}


def exact(parts, x, ids, weights, layout="standard", **properties):
    """The reference's output as a float64 tensor, computed from the layer as it is stored."""

    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value.double().numpy() if isinstance(value, torch.Tensor) else value

    gate_up, down, keywords = stored(parts, layout)
    keywords = {name: plain(value) for name, value in {**keywords, **properties}.items()}
    return torch.from_numpy(
        reference.moe(plain(x), ids.numpy(), plain(weights), plain(gate_up), plain(down), **keywords)
    )


def describe(parts, layout="standard", kernel=None, **properties):
    """The Experts of a layer in a layout."""
    gate_up, down, keywords = stored(parts, layout)
    return warpdecode.Experts(gate_up, down, kernel=kernel, **{**keywords, **properties})


def draw_tokens(parts, tokens, top_k, seed=0, routing_dtype=torch.float32):
    """(hidden_states, topk_ids, topk_weights); some ids are out of range, and their weights NaN."""
    generator = torch.Generator().manual_seed(seed)
    experts, hidden, _ = parts.down.shape
    x = torch.randn(tokens, hidden, generator=generator).to(parts.down.dtype)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator).to(routing_dtype)
    weights[(ids < 0) | (ids >= experts)] = float("nan")
    return x, ids, weights
