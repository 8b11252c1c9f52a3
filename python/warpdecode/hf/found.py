"""Which form a module's experts have."""

import torch

from . import dense, separate, stacked
from .forms import FORM, INTERFACE, OUTSIDE, Form, Unknown, is_dispatched


def form_of(module: torch.nn.Module) -> Form:
    """The module's form; `Unknown` when it has none that the kernels could serve."""
    known = getattr(type(module), FORM, None)
    if known is not None:  # it is patched
        return known
    if is_dispatched(module):
        return INTERFACE
    return _outside(module) or Unknown(f"{OUTSIDE} and is none of those known outside")


def is_block(module: torch.nn.Module) -> bool:
    """Whether the module's `experts` are served, or handed back, as a part of it."""
    experts = module._modules.get("experts")
    if experts is None or is_dispatched(experts):
        return False
    return hasattr(type(module), FORM) or _outside(module) is not None


def _outside(module) -> Form | None:
    return dense.find(module) or stacked.find(module) or separate.find(module)
