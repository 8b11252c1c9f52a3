"""One experts module: can the kernels serve it, and its description for them.

How the module is built and what its weights are is looked at once, and again when the weights are replaced. What a
single call brings is `call.py`'s.
"""

import torch

from .. import Experts, cuda_usable
from .call import PLAIN
from .gate import Gate, probe_gate

SLOT = "_warpdecode_layer"  # in module.__dict__: neither parameter, buffer, nor in the state dict

# The attributes in which transformers' decorator says how a class stores its weights, the value the kernels need, and
# what the other value means. Older releases lack the last.
_LAYOUT = (
    ("has_gate", True, "it has no gate projection (has_gate=False)"),
    ("is_transposed", False, "its weights are stored transposed, (E, H, 2I) and (E, I, H) (is_transposed=True)"),
    ("is_concatenated", True, "its gate and up rows are interleaved (is_concatenated=False)"),
    ("has_bias", False, "its projections have biases (has_bias=True)"),
    ("has_post_expert_norm", False, "it normalises each expert's output (has_post_expert_norm=True)"),
)


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether transformers looks this module's implementation up in its experts interface on every call."""
    state = module.__dict__
    return "config" in state and "is_concatenated" in state and hasattr(type(module).forward, "__wrapped__")


def built_against(module: torch.nn.Module) -> str | None:
    """The reason why the kernels can never serve this module, whatever its weights; None when they may."""
    if not is_dispatched(module):
        return "its class does not use transformers' experts interface (@use_experts_implementation)"
    if is_fp8(module):
        return "its weights are block-scaled FP8 (or FP4), and there is no kernel for them"
    for attribute, needed, meaning in _LAYOUT:
        if getattr(module, attribute, needed) != needed:
            return meaning
    return None


def is_fp8(module: torch.nn.Module) -> bool:
    """Whether this is one of transformers' FP8 experts, which have an experts interface of their own."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    return isinstance(module, FP8Experts)


def weights_of(module: torch.nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """(gate_up_proj, down_proj, kept): the weights as they are now. `kept` is false when they are ours for this call
    only and must not be held: computed on access, as under a LoRA parametrization, or brought to the device by an
    accelerate hook, whose offloading would free nothing if we held them."""
    parameters = module._parameters
    gate_up, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    if gate_up is not None and down is not None:
        return gate_up, down, "_hf_hook" not in module.__dict__
    return getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None), False


def _weights_against(gate_up, down) -> str | None:
    reason = _weight_against("gate_up_proj", gate_up) or _weight_against("down_proj", down)
    if reason is not None:
        return reason
    if gate_up.dtype is not down.dtype or gate_up.device != down.device:
        return (
            f"gate_up_proj is {gate_up.dtype} on {gate_up.device} and down_proj {down.dtype} on {down.device}; they "
            "must be the same"
        )
    if gate_up.device.type == "cuda":
        usable, sentence = cuda_usable()
        if not usable:
            return f"its weights are on {gate_up.device}, and {sentence.rstrip('.')}"
    return None


def _weight_against(name: str, weight) -> str | None:
    if weight is None:
        return f"it has no {name}"
    if type(weight) not in PLAIN:
        return f"{name} is a {type(weight).__name__}, not a plain torch.Tensor or Parameter"
    if weight.device.type == "meta":
        return f"{name} is on the meta device (offloaded, or not loaded yet)"
    if weight.layout is not torch.strided or not weight.is_contiguous():
        return f"{name} is not a contiguous strided tensor"
    return None


class Layer:
    """What is known about one module: `experts` to call, or the `reason` why there is none; `never` when other weights
    would not change that."""

    __slots__ = ("act_module", "device", "device_type", "dtype", "experts", "gate", "never", "reason")

    def __init__(self, module, gate_up, down, previous: "Layer | None" = None):
        self.experts = None
        self.gate: Gate | None = None
        self.act_module = module._modules.get("act_fn")
        self.reason = built_against(module)
        self.never = self.reason is not None
        self.reason = self.reason or _weights_against(gate_up, down)
        if self.reason is not None:
            return
        self.dtype, self.device, self.device_type = gate_up.dtype, gate_up.device, gate_up.device.type
        if previous is not None and previous.gate is not None and previous.act_module is self.act_module:
            self.gate = previous.gate  # new weights, same gate: RL replaces weights every step
        else:
            self.gate = probe_gate(module, gate_up.device)
        self.reason = self.gate.reason
        if self.reason is not None:
            self.never = True
            return
        try:
            self.experts = Experts(gate_up, down, activation=self.gate.activation)
        except ValueError as error:  # shapes, dtypes, alignment: the library knows its limits best and says them
            self.reason = str(error).rstrip(".")

    def __reduce__(self):
        # A copied or unpickled module has other weights. None is "not described yet", and NoneType needs no import of
        # ours where the copy is loaded.
        return type(None), ()

    def without_weights(self) -> "Layer":
        """What may be kept when the weights were computed for one call: the gate, and nothing that holds them."""
        kept = object.__new__(Layer)
        kept.act_module, kept.gate, kept.never = self.act_module, self.gate, self.never
        kept.experts = kept.reason = None
        return kept

    def still_describes(self, module, gate_up, down) -> bool:
        """Whether the weights and the activation are those that were described. A layer that could not be served is
        looked at again every time: its own path is slower than looking."""
        return (
            self.experts is not None
            and type(gate_up) in PLAIN
            and type(down) in PLAIN
            and module._modules.get("act_fn") is self.act_module
            and self.experts.matches(gate_up, down)
        )
