"""Patching a model in hand, for good or for a scope, and putting back what was there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import PatchedConfig, Policy, WarpDecodeFallbackError, warn
from .forms import Form, is_dispatched
from .forward import enter_registries, own_path_name
from .found import demand_module, moe_modules
from .layer import Layer, look_at
from .replaced import forward_against, is_replaced, replace, restore
from .state import POLICY, SLOT


def patch(model: torch.nn.Module, *, strict: bool = False) -> torch.nn.Module:
    """Makes the Mixture-of-Experts layers of `model` use warpdecode's kernels, in place, and returns it.

    Works on any module that contains transformers' experts modules: a causal LM, a vision-language model with a text
    model inside, one decoder layer. The model's configs are not touched: `generate()` may go on switching them between
    its implementations for prefill and decode, and so may `set_experts_implementation`; that chooses the path a layer
    takes where the kernels cannot serve it. Weights are read on every call, so LoRA, weight sync and `.to()` are safe.

    Layers that can never be served (another weight layout, another gate) stay as they are; so does, until it is
    patched again, a block that has to be probed and is on the meta device. Such layers, and calls that cannot be
    served, are said once per reason by a `WarpDecodeFallbackWarning`. With `strict=True` they raise
    `WarpDecodeFallbackError`: here when a layer can never be served or none can be served as the model is now (and
    then nothing was patched), or later in the call.

    The modules are run on probes to see what they compute, on copies without their hooks. A number, an activation or a
    forward that is changed later is seen by the next call; what lies within an attribute's value (a list, a config) is
    not. Experts with hooks or forwards of instances within them, or parameters besides the weights, are not served.
    torch.compile sees no hook that comes after it compiled, before torch 2.13 nor a method that is put on an instance;
    under `fullgraph=True` it raises an error of its own where strict=True forbids the model's own path.

    Patching again is the same as patching once, with the new `strict`. Undone by `unpatch`.
    """
    enter_registries()
    found = [(module, form) for _, module, form in moe_modules(model)]
    if not found:
        _nothing(f"{type(model).__name__} has no Mixture-of-Experts layers that could be patched", strict)
        return model
    policy = Policy(strict)
    layers = [(module, *_looked_at(module, form)) for module, form in found]
    if all(layer.reason is not None for _, layer, _ in layers):
        reasons = {(type(module).__name__, layer.reason) for module, layer, _ in layers}
        _nothing(
            f"none of the {len(layers)} Mixture-of-Experts layers of {type(model).__name__} can be served as the model "
            f"is now: {'; '.join(sorted(f'{name}: {reason}' for name, reason in reasons))}",
            strict,
        )
        policy.said |= reasons
    for module, layer, _ in layers:  # before the first is patched: under strict this raises
        if layer.never:
            policy.report(type(module).__name__, own_path_name(module), layer.reason)
    for module, layer, kept in layers:
        if not layer.never:
            if is_dispatched(module):
                module.__dict__["config"] = PatchedConfig(_inner(module.__dict__["config"]), policy)
            else:
                replace(module, layer.form, policy)
            module.__dict__[SLOT] = layer if kept else layer.without_weights()  # torch.compile may come first
    return model


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes `patch`, in place, and returns the model: every module has the config object it had before, and nothing of
    ours is left on it. Models that were never patched are left alone."""
    demand_module(model)
    for module in model.modules():
        config = module.__dict__.get("config")
        if type(config) is PatchedConfig:
            module.__dict__["config"] = config.inner
            module.__dict__.pop(SLOT, None)
        if is_replaced(module):
            restore(module)
            module.__dict__.pop(SLOT, None)
    return model


@contextmanager
def patched(model: torch.nn.Module, strict: bool = False) -> Iterator[torch.nn.Module]:
    """`with patched(model): ...`: patched inside, exactly as before afterwards, also when it was patched before.

    The scope belongs to the model, not to the thread: other threads that run it meanwhile get the kernels too.
    """
    demand_module(model)
    before = [(module, module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__]
    replaced = [(module, module.__dict__[POLICY]) for module in model.modules() if is_replaced(module)]
    patch(model, strict=strict)
    try:
        yield model
    finally:
        for module, config in before:
            if type(module.__dict__.get("config")) is PatchedConfig:
                module.__dict__["config"] = config
                if type(config) is not PatchedConfig:
                    module.__dict__.pop(SLOT, None)
        _put_back(model, replaced)


def _put_back(model, replaced) -> None:
    """Ends a scope for the modules outside transformers' interface: those in `replaced` had these policies."""
    policies = {id(module): policy for module, policy in replaced}
    for module in model.modules():
        if is_replaced(module):
            if id(module) in policies:
                module.__dict__[POLICY] = policies[id(module)]
            else:
                restore(module)
                module.__dict__.pop(SLOT, None)


def _looked_at(module, form: Form) -> tuple[Layer, bool]:
    layer, kept = look_at(module, form, anew=True)
    reason = None if layer.never else forward_against(module)
    if reason is not None:
        layer.reason, layer.never = reason, True
    return layer, kept


def _inner(config):
    return config.inner if type(config) is PatchedConfig else config


def _nothing(sentence: str, strict: bool) -> None:
    if strict:
        raise WarpDecodeFallbackError(f"warpdecode: {sentence}. Nothing was patched (strict=True).")
    warn(f"warpdecode: {sentence}.")
