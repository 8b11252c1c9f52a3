"""Which form a module's experts have."""

import inspect
from collections.abc import Iterator

import torch

from . import dense, separate, stacked
from .forms import INTERFACE, OUTSIDE, Form, Unknown, is_dispatched
from .state import FORM


def form_of(module: torch.nn.Module) -> Form:
    """The module's form; `Unknown` when it has none that the kernels could serve. Finding one outside transformers'
    interface runs the module."""
    known = getattr(type(module), FORM, None)
    if known is not None:  # it is patched
        return known
    if is_dispatched(module):
        return INTERFACE
    return _outside(module) or Unknown(f"{OUTSIDE} and is none of those known outside")


def demand_module(model) -> None:
    """Raises ValueError for what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: was a {type(model).__qualname__}, expected a torch.nn.Module")


def moe_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Form]]:
    """(name, module, form) of everything in `model` that looks like a Mixture-of-Experts layer's experts, served or
    not. A block that is patched as a whole stands for its `experts`, under their name."""
    demand_module(model)
    within = set()
    for name, module in model.named_modules():
        if module in within or isinstance(module, torch.jit.ScriptModule):
            continue
        if is_dispatched(module):
            yield name, module, INTERFACE
            continue
        form = _form_of_block(module)
        if form is not None:
            within.update(module._modules["experts"].modules())
            yield f"{name}.experts".lstrip("."), module, form
        elif _looks_like_experts(module):
            yield name, module, form_of(module)  # a class outside the experts interface: DBRX, LongCat


def _form_of_block(module) -> Form | None:
    """The form of a module whose `experts` are served, or handed back, as a part of it."""
    experts = module._modules.get("experts")
    if experts is None or is_dispatched(experts):
        return None
    return getattr(type(module), FORM, None) or _outside(module)


def _looks_like_experts(module) -> bool:
    """By its name or its weights, and because tokens come to it with a routing: shared experts take none."""
    taken = inspect.signature(type(module).forward).parameters.values()
    # The module, the tokens, ids and weights; JetMoE's take expert sizes in their place, shared experts at most gains.
    routed = len(taken) > 3 or any(each.kind is each.VAR_POSITIONAL or "expert" in each.name for each in taken)
    if not routed or next(module.parameters(), None) is None:
        return False
    if hasattr(type(module), FORM) or type(module).__name__.endswith("Experts"):
        return True
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(weight, torch.Tensor) and weight.dim() == 3 for weight in weights)


def _outside(module) -> Form | None:
    return dense.find(module) or stacked.find(module) or separate.find(module)
