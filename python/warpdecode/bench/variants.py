"""The experts that `generate()` is timed with: transformers' own, ours, and null experts, which read no weights or, as
`read`, read them and do nothing else.

Each variant has a model of its own, a twin on the same weights: a compiled step of one is never asked to serve another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import warpdecode.hf
from warpdecode.bench.random_models import twin
from warpdecode.bench.reading import read_experts
from warpdecode.hf.found import moe_modules
from warpdecode.hf.registries import FORWARD, demand_interface, implementation

# generate() replaces the name grouped_mm by batched_mm for its decode steps on a GPU: under another name it stays.
_KEPT = "warpdecode_bench_grouped_mm"
_NULL = "warpdecode_bench_null"
_READ = "warpdecode_bench_read"

# What a variant's model is told to use.
_ASKED = {
    "stock": "grouped_mm",  # transformers' default; generate() decides what its decode steps run
    "eager": "eager",
    "batched_mm": "batched_mm",
    "grouped_mm": _KEPT,
    "patched": "grouped_mm",
    "null": _NULL,
    "read": _READ,
}
NAMES = tuple(_ASKED)
STOCK = ("stock", "eager", "batched_mm", "grouped_mm")
# The experts' loop over what the host has read cannot be compiled in one piece, so a static cache leaves it out.
DEFAULT = {"static": ("stock", "patched", "null"), "eager": ("stock", "eager", "grouped_mm", "patched", "null")}


def _null_forward(module, hidden_states, top_k_index, top_k_weights):
    # Each expert returns its input. The router's weights matter: behind a product with 0 torch.compile drops the
    # router, top-k and all.
    return (hidden_states * top_k_weights.sum(-1, keepdim=True)).to(hidden_states.dtype)


def _read_forward(module, hidden_states, top_k_index, top_k_weights):
    read = read_experts(hidden_states, module.gate_up_proj, module.down_proj, top_k_index.shape[-1])
    return _null_forward(module, read, top_k_index, top_k_weights)


@contextmanager
def registered() -> Iterator[None]:
    """Our names in transformers' registry, for the scope."""
    demand_interface("warpdecode.bench.end_to_end", "5.0")
    FORWARD[_NULL] = _null_forward
    FORWARD[_READ] = _read_forward
    FORWARD[_KEPT] = implementation("grouped_mm", None)
    try:
        yield
    finally:
        del FORWARD[_NULL], FORWARD[_READ], FORWARD[_KEPT]


def model_of(model: torch.nn.Module, variant: str) -> torch.nn.Module:
    """A twin of the model that runs this variant. `registered()` must be on."""
    found = twin(model)
    found.set_experts_implementation(_ASKED[variant])
    if variant == "patched":
        warpdecode.hf.patch(found, strict=True)
    return found


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's experts, layer by layer."""
    return [module for _, module, _ in moe_modules(model)]


def running(experts: torch.nn.Module) -> str:
    """What transformers would run if these experts were called now, by its own name where it has one."""
    name = experts.config._experts_implementation
    return {_KEPT: "grouped_mm", _NULL: "null", _READ: "read"}.get(name, name)
