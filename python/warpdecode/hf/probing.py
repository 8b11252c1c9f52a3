"""Running a foreign module to see what it computes, without a trace: on a double, and with torch's state as it was."""

from collections import OrderedDict
from contextlib import contextmanager

import torch

from .state import INSTANCE_FORWARDS, POLICY, SLOT

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def probing(device: torch.device):
    """What a module computes inside is computed without gradients and autocast, on that device, and costs the caller
    no random numbers."""
    devices = [device] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast, torch.random.fork_rng(devices), torch.device(device):
        yield


def double(module: torch.nn.Module, training: bool = False, **children: torch.nn.Module) -> torch.nn.Module:
    """The module once more, unpatched, without hooks, with these children: its parameters are the module's, all else
    that a forward may change is its own."""
    made = object.__new__(type(module))
    state = made.__dict__
    state.update(module.__dict__)
    if "_hf_hook" in state:  # device_map's, whose forward is the module's own
        for name in ("_hf_hook", *INSTANCE_FORWARDS):
            state.pop(name, None)
    for name in (POLICY, SLOT):
        state.pop(name, None)
    state |= {name: OrderedDict() for name in _HOOKS}
    state["training"] = training and module.training
    state["_parameters"] = dict(module._parameters)
    state["_buffers"] = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    state["_modules"] = {
        name: children[name] if name in children else None if child is None else double(child, training)
        for name, child in module._modules.items()
    }
    return made


def noted(made: torch.nn.Module) -> list:
    """What a double is before it runs, for `changed`."""
    return [(each, dict(each.__dict__), {n: b.clone() for n, b in each._buffers.items() if b is not None})
            for each in made.modules()]  # fmt: skip


def changed(before: list) -> str | None:
    """The name of something that running a double has left on it."""
    for each, state, buffers in before:
        for name in (*state, *each.__dict__):
            if each.__dict__.get(name) is not state.get(name):
                return name
        for name, buffer in buffers.items():
            now = each._buffers.get(name)
            if now is None or now.shape != buffer.shape or not torch.equal(now, buffer):
                return name
    return None
