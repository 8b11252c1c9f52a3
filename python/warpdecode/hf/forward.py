"""The function transformers calls for `experts_implementation="warp_decode"`, and its registration."""

import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .call import call_against, watched
from .config import NAME, PatchedConfig, Policy, own_implementation, policies, policy_of
from .layer import built_against, is_dispatched, layer_of

COMPILING = "torch.compile (or torch.export) is tracing the model, and the kernels cannot be traced"


def register() -> None:
    """Makes "warp_decode" a valid experts implementation of transformers.

    After this `from_pretrained(..., experts_implementation="warp_decode")`, `from_config(...)` likewise and
    `model.set_experts_implementation("warp_decode")` work. May be called more than once. Used by name, a layer that
    cannot be served takes grouped_mm, the path transformers chooses by default, and says so once; `patch` offers
    `strict` and keeps the path the model had.
    """
    # The global mappings, not an instance's: transformers may make new interface objects. One name in both, because
    # transformers accepts a name that either has and an FP8 model would find nothing under ours when it runs.
    type(ALL_EXPERTS_FUNCTIONS).register(NAME, experts_forward)
    type(ALL_FP8_EXPERTS_FUNCTIONS).register(NAME, fp8_experts_forward)


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
    if torch.compiler.is_compiling():
        _report_compiling(self)
        return _own_path(self)(self, hidden_states, top_k_index, top_k_weights)
    inputs = (hidden_states, top_k_index, top_k_weights)
    reason = watched()
    if reason is not None:
        return _hand_over(self, reason, inputs)
    layer, weights = layer_of(self)
    reason = layer.reason or call_against(layer, weights, inputs)
    if reason is not None:
        return _hand_over(self, reason, inputs)
    try:
        return layer.experts(*inputs)
    except ValueError:
        # Strided or misaligned views are refused before anything is launched. They are too rare to be looked for on
        # every call; a mistake that is none of the layout is refused again, with its own sentence.
        return layer.experts(*(t.clone(memory_format=torch.contiguous_format) for t in inputs))


def fp8_experts_forward(self: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
    """The same name asked of transformers' FP8 experts: their own default path, said once."""
    if torch.compiler.is_compiling():
        _report_compiling(self)
    else:
        policy_of(self).report(type(self).__name__, "grouped_mm", built_against(self))
    return ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](self, *args, **kwargs)


def own_path_name(module: torch.nn.Module) -> str:
    """The name of the path `module` takes without us, for people."""
    return (own_implementation(module) or "eager") if is_dispatched(module) else "its own forward"


def _hand_over(module: torch.nn.Module, reason: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    policy_of(module).report(type(module).__name__, own_path_name(module), reason)
    return _own_path(module)(module, *inputs)


def _own_path(module: torch.nn.Module):
    # __wrapped__ is the class's forward as it was written, which transformers' decorator keeps for "eager".
    return ALL_EXPERTS_FUNCTIONS.get_interface(own_implementation(module), type(module).forward.__wrapped__)


def _report_compiling(module: torch.nn.Module) -> None:
    config = module.config
    key = config.policy.key if type(config) is PatchedConfig else ""
    _report_compiling_by_key(key, type(module).__name__, own_implementation(module) or "eager")


_policy_by_name_compiling = Policy()


# Runs while tracing and leaves nothing in the graph; a warning in the graph would break it.
@torch.compiler.assume_constant_result
def _report_compiling_by_key(key: str, class_name: str, own_path: str) -> None:
    policy = policies.get(key, _policy_by_name_compiling)
    policy.report(class_name, own_path, COMPILING)
