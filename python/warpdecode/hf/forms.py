"""Forms: how a kind of module keeps its experts' weights, and what they are as arguments of `warpdecode.Experts`.

Classes of transformers' experts interface say it by the flags of its decorator (`Interface`, here). Those outside are
recognised by what they have and compute: `stacked.py`, `dense.py` and `separate.py` hold their forms, `found.py` finds
a module's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import state
from .registries import FP8Experts
from .state import BASE

ABSENT = "on the meta device (offloaded, or not loaded yet)"
OUTSIDE = "its class does not use transformers' experts interface (@use_experts_implementation)"

# The attributes in which transformers' decorator says how a class stores its weights: the standard value, and the
# arguments of `warpdecode.Experts` that say the other one. Biases are weights, and come with them.
_LAYOUT = (
    ("has_gate", True, {"has_gate": False}),
    ("is_transposed", False, {"is_transposed": True}),
    ("is_concatenated", True, {"is_interleaved": True}),
)


class Part(NamedTuple):
    """An argument of `warpdecode.Experts` among a form's weights: the one at `first`, or the `count` from there on as a
    list. `shape`: seen as this shape, from its first number on; None: as it is."""

    argument: str
    first: int
    count: int | None = None
    shape: tuple[int, ...] | None = None


def unfit(parts, weights) -> str | None:
    """The reason why these weights cannot be seen as the arguments of `warpdecode.Experts`."""
    for argument, first, count, shape in parts:
        if count is None:
            weight = weights[first]
            if not weight.is_contiguous():
                return f"{argument} is not a contiguous tensor"
            if shape is not None and weight.numel() < math.prod(shape):
                return f"{argument} is {tuple(weight.shape)}, which is a part of {shape} only (sharded, or cut)"
    return None


def bound(parts, weights) -> dict:
    """The arguments of `warpdecode.Experts` that these weights are, which must fit. Views, never copies."""
    found = {}
    for argument, first, count, shape in parts:
        if count is not None:
            found[argument] = weights[first : first + count]
        elif shape is None:
            found[argument] = weights[first]
        else:
            found[argument] = weights[first].detach().view(-1)[: math.prod(shape)].view(shape)
    return found


class Form:
    """A module's form. Its fields are constants of the class that the module has while it is patched."""

    seam = "forward"  # the method that is replaced, where transformers has no interface for it
    takes_all_weights = False  # whether that takes a weight for every expert; then `call` says which count

    def against(self, module) -> str | None:
        """The reason why the kernels cannot serve the module as it is now, whatever its weights; None when they may."""
        return state.against(module, self.names(module), tuple(state.below(module)))

    def names(self, module) -> tuple[str, ...]:
        """The names of the weights."""
        raise NotImplementedError

    def parts(self, module) -> tuple[Part, ...]:
        """What they are."""
        raise NotImplementedError

    def weights(self, module, names) -> tuple[tuple, bool]:
        """(the weights of these names as they are now, kept). `kept` is false when they are ours for this call only
        and must not be held: computed on access, as under a LoRA parametrization, or brought to the device by an
        accelerate hook, whose offloading would free nothing if we held them."""
        weights = tuple(map(module._parameters.get, names))
        for weight in weights:
            if weight is None:
                return tuple([computed(module, name) for name in names]), False
        return weights, not on_loan(module)

    def arguments(self, module) -> dict:
        """What `warpdecode.Experts` is told about the layout."""
        return {}

    def state(self, module) -> tuple:
        """What besides the weights was looked at: while it `state.holds`, so does what was found."""
        return state.taken(module)

    def watch(self, module, weights):
        """Where looking at the weights and the structure anew takes long: an object whose `sees_no_change()` says
        quickly whether both are what they were. Otherwise None."""
        return None

    def gate(self, module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(gates, ups) -> what the module makes of them."""
        raise NotImplementedError

    def difference(self, module, experts) -> tuple[str | None, bool]:
        """(the reason when the module's own forward, on a probe, is not what `experts` compute; whether it would not be
        with other weights either)."""
        return None, False

    def changed(self, module) -> str | None:
        """The reason when what is computed around the experts is not what it was when this form was found."""
        return None

    def experts_and_identities(self, module) -> tuple[int, int]:
        """How many of either: ids from the first number on are of experts that return their input."""
        raise NotImplementedError

    def returned(self, module, hidden_states, ids, weights, out):
        """What the module's own method returns, of what the kernels gave, to whom such ids are nobody's."""
        experts, identities = self.experts_and_identities(module)
        if identities:
            kept = weights.float().masked_fill(ids < experts, 0.0).sum(dim=-1, keepdim=True)
            out = torch.addcmul(out.float(), kept, hidden_states.float()).to(out.dtype)
        return out

    def sizes(self, module, weights) -> dict[str, int | None]:
        """E, H and I, of the weights."""
        return {"E": None, "H": None, "I": None}


class Interface(Form):
    """A class of transformers' experts interface."""

    def against(self, module):
        if is_fp8(module):
            return "its weights are block-scaled FP8 (or FP4), and there is no kernel for them"
        if getattr(module, "has_post_expert_norm", False):
            return "it normalises each expert's output (has_post_expert_norm=True)"
        return super().against(module)

    def names(self, module):
        first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        biases = (f"{first}_bias", "down_proj_bias") if getattr(module, "has_bias", False) else ()
        return (first, "down_proj", *biases)

    def parts(self, module):
        arguments = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        return tuple([Part(arguments[i], i) for i in range(len(self.names(module)))])

    def arguments(self, module):
        found = {}
        for attribute, standard, arguments in _LAYOUT:
            if getattr(module, attribute, standard) != standard:
                found |= arguments
        return found

    def gate(self, module):
        if not getattr(module, "has_gate", True):
            return lambda g, u: module.act_fn(g) * u  # no up: the activation alone, looked up as if there were one
        if getattr(module, "is_concatenated", True):
            return lambda g, u: module._apply_gate(torch.cat([g, u], dim=-1))
        return lambda g, u: module._apply_gate(torch.stack([g, u], dim=-1).flatten(-2))

    def sizes(self, module, weights):
        down = weights[1]
        if down is None or down.dim() != 3:
            return super().sizes(module, weights)
        e, h, i = down.shape
        return {"E": e, "H": i, "I": h} if module.is_transposed else {"E": e, "H": h, "I": i}


class Unknown(Form):
    """What looks like experts, but is none of the forms; the reason says why."""

    def __init__(self, reason: str):
        self.reason = reason

    def against(self, module):
        return self.reason

    def names(self, module):
        return ()

    def parts(self, module):
        return ()


INTERFACE = Interface()


def computed(module: torch.nn.Module, name: str):
    """A weight that is no plain parameter: what a parametrization computes, a buffer; None where there is none."""
    # Asked of the class first: torch.compile would run a parametrization to see whether the module has it.
    owners = module.__dict__, module._parameters, module._buffers
    if hasattr(type(module), name) or any([name in owner for owner in owners]):
        return getattr(module, name)
    return None


def own_method(module: torch.nn.Module, seam: str = "forward"):
    """The function of the module's own class, patched or not."""
    return getattr(getattr(type(module), BASE, type(module)), seam)


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether transformers looks this module's implementation up in its experts interface on every call."""
    state = module.__dict__
    return "config" in state and "is_transposed" in state and hasattr(type(module).forward, "__wrapped__")


def is_fp8(module: torch.nn.Module) -> bool:
    """Whether this is one of transformers' FP8 experts, which have an experts interface of their own."""
    return FP8Experts is not None and isinstance(module, FP8Experts)


def on_loan(module: torch.nn.Module) -> bool:
    """Whether a hook of device_map takes the module's weights away after the call."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return False
    return any([getattr(each, "offload", True) for each in getattr(hook, "hooks", (hook,))])
