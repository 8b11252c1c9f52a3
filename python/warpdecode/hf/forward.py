"""The function transformers calls for `experts_implementation="warp_decode"`, and its registration."""

from collections.abc import Callable
from typing import Protocol

import torch

from . import compiled
from .call import GLOBAL_HOOKS, block_call_against, call_against, watched
from .config import NAME, Policy, own_implementation, policy_key, policy_of
from .forms import INTERFACE, is_dispatched
from .layer import Layer, layer_of
from .registries import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FORWARD,
    FP8_FORWARD,
    NAMES_ARE_OPEN,
    VERSION,
    as_written,
    demand_interface,
    implementation,
)


def register() -> None:
    """Makes "warp_decode" a valid experts implementation of transformers, in this process: one that loads such a model
    (torch.load) or its config calls this first, or transformers raises a KeyError.

    After this `from_pretrained(..., experts_implementation="warp_decode")`, `from_config(...)` likewise and
    `model.set_experts_implementation("warp_decode")` work. May be called more than once. Used by name, a layer that
    cannot be served takes grouped_mm, the path transformers chooses by default, and says so once; `patch` offers
    `strict` and keeps the path the model had. A class outside transformers' experts interface (Llama 4, DBRX, LongCat)
    asks for no implementation: of a name it takes no notice, and nothing is said. `patch` serves these.

    Raises RuntimeError with transformers before 5.7, which accepts no names but its own.
    """
    demand_interface("register()", "5.7")
    if not NAMES_ARE_OPEN:
        raise RuntimeError(
            f"warpdecode: transformers {VERSION} accepts no experts implementation but its own by name; 5.7 and newer "
            "do. warpdecode.hf.patch(model) and warpdecode.hf.accelerate_decode() work with this one."
        )
    enter_registries()


def enter_registries() -> None:
    """Our function in both registries under one name: transformers accepts a name that either has, and an FP8 model
    would find nothing under ours when it runs."""
    FORWARD[NAME] = experts_forward
    if FP8_FORWARD is not None:
        FP8_FORWARD[NAME] = fp8_experts_forward


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """A layer's experts on [T, H] hidden states, [T, K] ids and weights: by the kernels, or by the model's own path.

    Ids equal to the number of local experts are expert parallelism's mark for another rank's; the kernels skip them.
    The returned tensor is fresh, because expert parallelism reduces it in place.
    """
    return serve(self, (hidden_states, top_k_index, top_k_weights), _CONFIGURED)


class Caller(Protocol):
    """On whose behalf a layer is served: what it does where the kernels cannot."""

    def policy(self, module: torch.nn.Module) -> Policy:
        """Whether that raises, and what was said."""

    def key(self, module: torch.nn.Module) -> str:
        """The key in `policies` of the policy while compiling."""

    def own_name(self, module: torch.nn.Module) -> str:
        """The name of the path that is taken then, for people."""

    def own_path(self, module: torch.nn.Module) -> Callable:
        """Its function: (module, hidden_states, ids, weights) -> output."""


class _Configured:
    """A module that was patched, or whose config asks for us by name."""

    policy, key = staticmethod(policy_of), staticmethod(policy_key)

    @staticmethod
    def own_name(module):
        return own_path_name(module)

    @staticmethod
    def own_path(module):
        return implementation(own_implementation(module), as_written(type(module)))


_CONFIGURED = _Configured()


def serve(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], caller: Caller) -> torch.Tensor:
    """One call of a module's experts on (hidden states, ids, weights)."""
    if torch.compiler.is_compiling():
        return compiled.serve(module, inputs, caller)
    reason, layer = _ready(module, inputs)
    if reason is not None:
        caller.policy(module).report(type(module).__name__, caller.own_name(module), reason)
        return caller.own_path(module)(module, *inputs)
    return _run(layer, inputs)


def prepared(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[str | None, Callable | None]:
    """(the reason why the kernels cannot serve this call, what to call with hidden states, ids and weights otherwise),
    for a module that is asked about before its own path is chosen. `inputs` are these three; the hidden states alone
    when a block makes the others itself."""
    if torch.compiler.is_compiling():
        return compiled.prepared(module, inputs)
    if any(GLOBAL_HOOKS):
        return "a hook of all modules is registered with torch, and would not see those within the experts", None
    reason, layer = _ready(module, inputs)
    return reason, None if reason is not None else lambda *call: _run(layer, call)


def _ready(module, inputs) -> tuple[str | None, Layer | None]:
    reason = watched()
    if reason is not None:
        return reason, None
    layer, weights = layer_of(module)
    if layer.reason is not None:
        return layer.reason, layer
    if len(inputs) == 1:
        return block_call_against(module, layer.names, weights, *inputs), layer
    return call_against(layer.names, weights, inputs), layer


def _run(layer: Layer, inputs) -> torch.Tensor:
    try:
        return layer.experts(*inputs)
    except ValueError:
        # Strided or misaligned views are refused before anything is launched. They are too rare to be looked for on
        # every call; a mistake that is none of the layout is refused again, with its own sentence.
        return layer.experts(*(t.clone(memory_format=torch.contiguous_format) for t in inputs))


def fp8_experts_forward(self: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
    """The same name asked of transformers' FP8 experts: their own default path, said once."""
    report_fp8(self, _CONFIGURED, "grouped_mm")
    return ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](self, *args, **kwargs)


def report_fp8(module: torch.nn.Module, caller: Caller, own_name: str) -> None:
    """Says that the module's FP8 experts are not served."""
    if torch.compiler.is_compiling():
        compiled.say(caller.key(module), type(module).__name__, own_name, INTERFACE.against(module))
    else:
        caller.policy(module).report(type(module).__name__, own_name, INTERFACE.against(module))


def own_path_name(module: torch.nn.Module) -> str:
    """The name of the path `module` takes without us, for people."""
    return (own_implementation(module) or "eager") if is_dispatched(module) else "its own forward"
