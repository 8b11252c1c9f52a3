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
from warpdecode.bench.variant_names import ASKED, KEPT, NULL, READ
from warpdecode.hf.found import moe_modules
from warpdecode.hf.registries import FORWARD, demand_interface, implementation


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
    FORWARD[NULL] = _null_forward
    FORWARD[READ] = _read_forward
    FORWARD[KEPT] = implementation("grouped_mm", None)
    try:
        yield
    finally:
        del FORWARD[NULL], FORWARD[READ], FORWARD[KEPT]


def model_of(model: torch.nn.Module, variant: str) -> torch.nn.Module:
    """A twin of the model that runs this variant. `registered()` must be on."""
    found = twin(model)
    found.set_experts_implementation(ASKED[variant])
    if variant == "patched":
        warpdecode.hf.patch(found, strict=True)
    return found


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's experts, layer by layer."""
    return [module for _, module, _ in moe_modules(model)]


def running(experts: torch.nn.Module) -> str:
    """What transformers would run if these experts were called now, by its own name where it has one."""
    name = experts.config._experts_implementation
    return {KEPT: "grouped_mm", NULL: "null", READ: "read"}.get(name, name)
