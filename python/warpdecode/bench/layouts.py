"""The benchmark's layer in other layouts: the same memory, read as if it were stored so.

The weights are random, so every way to read their bytes is a layer; its time is what is asked for. That a layout gives
the right numbers, tests/test_layouts_cuda.py shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import warpdecode
from warpdecode.bench import options

if TYPE_CHECKING:  # `warpdecode bench --help` names the layouts without torch
    import torch

    from warpdecode.bench.layers import Layers

NAMES = {
    "transposed": "gate_up_proj [E, H, 2I], down_proj [E, I, H]",
    "interleaved": "rows gate(0), up(0), gate(1), ...",
    "gpt-oss": "transposed, interleaved, with biases and gpt-oss' gate",
    "llama-4": "transposed, the routing weight on the input",
    "separate": "gate and up apart",
    "pointers": "a matrix an expert",
}
_GPT_OSS_GATE = {"activation": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0}


def chosen(text: str) -> list[str]:
    """The layouts of a comma-separated list of names, or "all"; none of an empty text. Raises ValueError for others."""
    if not text:
        return []
    return list(NAMES) if text.strip() == "all" else options.names(text, NAMES, "all or some of")


def label(layout: str) -> str:
    """A layout's name among the candidates of a row."""
    return f"layout {layout}"


def described(layers: Layers, layout: str) -> list[warpdecode.Experts]:
    """Each copy of the layer in the layout."""
    return [_described(layers, layout, *pair) for pair in zip(layers.gate_up, layers.down, strict=True)]


def _described(layers: Layers, layout: str, gate_up: torch.Tensor, down: torch.Tensor) -> warpdecode.Experts:
    experts, hidden, intermediate = down.shape
    arrays, properties = {}, {"activation": layers.shape.activation}
    if layout in ("transposed", "gpt-oss", "llama-4"):
        gate_up = gate_up.view(experts, hidden, 2 * intermediate)
        down = down.view(experts, intermediate, hidden)
        properties["is_transposed"] = True
    if layout in ("interleaved", "gpt-oss"):
        properties["is_interleaved"] = True
    if layout == "gpt-oss":  # biases for each copy: they are to be as cold as the weights
        arrays = {
            name: down.new_empty(experts, length).normal_()
            for name, length in (("gate_up_bias", 2 * intermediate), ("down_bias", hidden))
        }
        properties.update(_GPT_OSS_GATE)
    if layout == "llama-4":
        properties["weight_on_input"] = True
    if layout == "separate":
        gate_up, arrays["up_proj"] = gate_up.view(2, experts, intermediate, hidden)
    if layout == "pointers":
        gate_up, down = list(gate_up), list(down)
    return warpdecode.Experts(gate_up, down, **arrays, **properties)
