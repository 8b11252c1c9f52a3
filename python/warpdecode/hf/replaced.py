"""Modules outside transformers' experts interface, patched: an instance gets a class of ours that differs from its own
in the one method that calls the experts.

The class is a subclass of the module's own, with its name, so `isinstance`, `repr` and hooks see no difference, and
the same for all layers of a model, so that torch.compile sees one. `copy` and `pickle` make such an instance again.
"""

import functools
import types

import torch

from . import asking, blocks, compiled
from .config import Policy
from .forms import Form, is_dispatched, own_method
from .forward import prepared
from .state import BASE, FORM, INSTANCE_FORWARDS, POLICY

OWN_PATH = "its own forward"


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether `replace` was the last that happened to the module."""
    return POLICY in module.__dict__


def replace(module: torch.nn.Module, form: Form, policy: Policy) -> None:
    """Patches the module, or changes its policy."""
    if not hasattr(type(module), FORM):
        _change_class(module, _class_of(type(module), form))
    module.__dict__[POLICY] = policy


def restore(module: torch.nn.Module) -> None:
    """Undoes it."""
    module.__dict__.pop(POLICY, None)
    # A class that somebody made of ours (a parametrization, FSDP) stays; without a policy it does what its own did.
    if BASE in type(module).__dict__:
        _change_class(module, getattr(type(module), BASE))


def _change_class(module, to: type) -> None:
    before = type(module)
    bound = [name for name in INSTANCE_FORWARDS if _is_bound(module.__dict__.get(name), module, before)]
    module.__class__ = to
    for name in bound:
        module.__dict__[name] = types.MethodType(to.forward, module)


def _is_bound(function, module, owner: type) -> bool:
    return isinstance(function, types.MethodType) and function.__self__ is module and function.__func__ is owner.forward


def forward_against(module: torch.nn.Module) -> str | None:
    """The reason why a call of the module would not reach us: transformers is not asked for an implementation, or
    somebody put another forward on the instance."""
    if is_dispatched(module):
        return asking.unanswered(module)
    if is_replaced(module):
        return None  # what came after a patch calls ours
    if "parametrizations" in module._modules:
        return "it is parametrized, and its class cannot be replaced now; patch it before, or remove_parametrizations"
    state = module.__dict__
    outer = state.get("_old_forward", state.get("forward"))
    if outer is None or _is_bound(outer, module, type(module)):
        return None
    return f"its forward was replaced on the instance by {getattr(outer, '__qualname__', type(outer).__name__)}"


@functools.cache
def _class_of(base: type, form: Form) -> type:
    method = _moe if form.seam == "moe" else _block if getattr(form, "recipe", None) else _experts
    if form.takes_all_weights:
        method = _dense
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        FORM: form,
        BASE: base,
        form.seam: method,
    }
    return type(base.__name__, (base,), names)


def _reduce(self, protocol):
    kind = type(self)
    return _made_again, (getattr(kind, BASE), getattr(kind, FORM)), self.__dict__


def _made_again(base, form):
    kind = _class_of(base, form)
    return kind.__new__(kind)


def _experts(self, hidden_states, top_k_index, top_k_weights):
    """In the place of an experts module's forward."""
    return _served(self, "forward", hidden_states, top_k_index, top_k_weights)


def _moe(self, hidden_states, topk_indices, topk_weights):
    """In the place of a block's method that calls the experts."""
    return _served(self, "moe", hidden_states, topk_indices, topk_weights)


def _served(module, seam, *call):
    if POLICY not in module.__dict__:
        return own_method(module, seam)(module, *call)
    tokens = call[0].reshape(-1, call[0].shape[-1])
    reason, run = prepared(module, (tokens, *call[1:]))
    if reason is not None:
        _report(module, reason)
        return own_method(module, seam)(module, *call)
    return getattr(type(module), FORM).returned(module, *call, run(tokens, *call[1:]))


def _dense(self, hidden_states, *routing, **named):
    """In the place of the forward of experts that take a weight for every expert."""
    if POLICY not in self.__dict__:
        return own_method(self)(self, hidden_states, *routing, **named)
    form = getattr(type(self), FORM)
    call = form.call(hidden_states, *routing, **named)
    reason, run = prepared(self, call)
    if reason is not None:
        _report(self, reason)
        return own_method(self)(self, hidden_states, *routing, **named)
    return form.returned(self, hidden_states, *call[1:], run(*call))


def _block(self, hidden_states, *others, **named):
    """In the place of a block's forward."""
    if POLICY not in self.__dict__:
        return own_method(self)(self, hidden_states, *others, **named)
    reason = "its forward was called with more than the hidden states" if others or named else None
    run = None
    if reason is None:
        reason = blocks.noise_against(self)
    if reason is None:
        # The router's parameters stand for the routing weights, which would need gradients through them. Asked before
        # it runs: whoever records a router's output must see one.
        reason, run = prepared(self, (hidden_states.reshape(-1, hidden_states.shape[-1]),))
    if reason is not None:
        _report(self, reason)
        return own_method(self)(self, hidden_states, *others, **named)
    return blocks.follow(getattr(type(self), FORM).recipe, self, hidden_states, run)


def _report(module, reason: str) -> None:
    policy = module.__dict__[POLICY]
    if torch.compiler.is_compiling():
        compiled.say(policy.key, type(module).__name__, OWN_PATH, reason)
    else:
        policy.report(type(module).__name__, OWN_PATH, reason)
