"""One experts module: can the kernels serve it, and its description for them.

How the module is built and what its weights are is looked at once, and again when the weights are replaced. What a
single call brings is `call.py`'s.
"""

import functools
import json
import weakref

import torch

from .. import Experts, cuda_usable
from .call import PLAIN
from .gate import EXPERTS_ARGUMENTS, Gate, probe_gate
from .registries import FP8Experts

SLOT = "_warpdecode_layer"  # in module.__dict__: neither parameter, buffer, nor in the state dict

# Layers by their weights' addresses, for compiled code, which has the weights but no module.
_by_address: "weakref.WeakValueDictionary[tuple[int, ...], Layer]" = weakref.WeakValueDictionary()

# The attributes in which transformers' decorator says how a class stores its weights: the standard value, the argument
# of `warpdecode.Experts` that says the other one, and what that means. Older releases lack the last.
_LAYOUT = (
    ("has_gate", True, {"has_gate": False}, "it has no gate projection (has_gate=False)"),
    (
        "is_transposed",
        False,
        {"is_transposed": True},
        "its weights are stored transposed, (E, H, 2I) and (E, I, H) (is_transposed=True)",
    ),
    (
        "is_concatenated",
        True,
        {"is_interleaved": True},
        "its gate and up rows are interleaved (is_concatenated=False)",
    ),
    # The values of these two are weights, and come with them.
    ("has_bias", False, {"gate_up_bias": None, "down_bias": None}, "its projections have biases (has_bias=True)"),
    ("has_post_expert_norm", False, None, "it normalises each expert's output (has_post_expert_norm=True)"),
)


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether transformers looks this module's implementation up in its experts interface on every call."""
    state = module.__dict__
    return "config" in state and "is_transposed" in state and hasattr(type(module).forward, "__wrapped__")


def built_against(module: torch.nn.Module) -> str | None:
    """The reason why the kernels can never serve this module, whatever its weights; None when they may."""
    if not is_dispatched(module):
        return "its class does not use transformers' experts interface (@use_experts_implementation)"
    if is_fp8(module):
        return "its weights are block-scaled FP8 (or FP4), and there is no kernel for them"
    for attribute, standard, arguments, meaning in _LAYOUT:
        known = arguments is not None and arguments.keys() <= EXPERTS_ARGUMENTS
        if not known and getattr(module, attribute, standard) != standard:
            return meaning
    return None


def _layout_arguments(module: torch.nn.Module) -> dict:
    """What `warpdecode.Experts` is told about a layout that is not the standard one; its weights are not among it."""
    found = {}
    for attribute, standard, arguments, _ in _LAYOUT:
        if getattr(module, attribute, standard) != standard:
            found |= {name: value for name, value in arguments.items() if value is not None}
    return found


def _biases_among(weights) -> dict[str, torch.Tensor]:
    """The arguments of `warpdecode.Experts` that the weights after the two projections are."""
    return dict(zip(("gate_up_bias", "down_bias"), weights[2:], strict=True)) if len(weights) > 2 else {}


def is_fp8(module: torch.nn.Module) -> bool:
    """Whether this is one of transformers' FP8 experts, which have an experts interface of their own."""
    return FP8Experts is not None and isinstance(module, FP8Experts)


def weight_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of the weights that the module's kind has: the two projections, then their biases."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    biases = (f"{first}_bias", "down_proj_bias") if getattr(module, "has_bias", False) else ()
    return (first, "down_proj", *biases)


def weights_of(module: torch.nn.Module, names: tuple[str, ...]) -> tuple[tuple, bool]:
    """(the weights of these names as they are now, kept). `kept` is false when they are ours for this call only and
    must not be held: computed on access, as under a LoRA parametrization, or brought to the device by an accelerate
    hook, whose offloading would free nothing if we held them."""
    weights = tuple(map(module._parameters.get, names))
    for weight in weights:
        if weight is None:
            return tuple([getattr(module, name, None) for name in names]), False
    return weights, not _on_loan(module)


def _on_loan(module: torch.nn.Module) -> bool:
    # device_map puts a hook on every module; those that offload take the weights away after the call.
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return False
    return any([getattr(each, "offload", True) for each in getattr(hook, "hooks", (hook,))])


def weights_between_calls(module: torch.nn.Module) -> tuple[tuple, bool]:
    """The same of a module that is not running. Tensor and expert parallelism keep DTensors in it, and bring this
    process's part of them for the time of a call: that part is what a call will bring. A call that brings a DTensor
    is not served: nobody would sum what the processes compute."""
    weights, kept = weights_of(module, weight_names(module))
    local = tuple([weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights])
    return local, kept and all(a is b for a, b in zip(local, weights, strict=True))


def weights_against(names, weights) -> str | None:
    for name, weight in zip(names, weights, strict=True):
        reason = _weight_against(name, weight)
        if reason is not None:
            return reason
    first = weights[0]
    for name, weight in zip(names, weights, strict=True):
        if weight.dtype is not first.dtype or weight.device != first.device:
            return (
                f"{names[0]} is {first.dtype} on {first.device} and {name} {weight.dtype} on {weight.device}; they "
                "must be the same"
            )
    if first.device.type == "cuda":
        usable, sentence = cuda_usable()
        if not usable:
            return f"its weights are on {first.device}, and {sentence.rstrip('.')}"
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
    would not change that. `names` are those of its weights, which are given as they are now; `description` is what is
    known without them: the arguments of `warpdecode.Experts`, as JSON, because compiled code can hold strings."""

    __slots__ = ("__weakref__", "act_module", "description", "experts", "gate", "kinds", "names", "never", "reason")

    def __init__(self, module, weights, previous: "Layer | None" = None):
        self.experts = None
        self.gate: Gate | None = None
        self.description = ""
        self.kinds = kinds_of(weights)
        self.names = weight_names(module)
        self.act_module = module._modules.get("act_fn")
        self.reason = built_against(module)
        self.never = self.reason is not None
        self.reason = self.reason or weights_against(self.names, weights)
        if self.reason is not None:
            return
        if previous is not None and previous.gate is not None and previous.act_module is self.act_module:
            self.gate = previous.gate  # new weights, same gate: RL replaces weights every step
        else:
            self.gate = probe_gate(module, weights[0].device)
        self.reason = self.gate.reason
        if self.reason is not None:
            self.never = True
            return
        arguments = self.gate.arguments | _layout_arguments(module)
        self.description = json.dumps(arguments, sort_keys=True)
        try:
            self.experts = Experts(*weights[:2], **arguments, **_biases_among(weights))
        except ValueError as error:  # shapes, dtypes, alignment: the library knows its limits best and says them
            self.reason = str(error).rstrip(".")
        else:
            _by_address[_addresses(weights)] = self

    def __reduce__(self):
        # A copied or unpickled module has other weights. None is "not described yet", and NoneType needs no import of
        # ours where the copy is loaded.
        return type(None), ()

    def without_weights(self) -> "Layer":
        """What may be kept when the weights were computed for one call: the gate, and nothing that holds them."""
        kept = object.__new__(Layer)
        kept.act_module, kept.gate, kept.description = self.act_module, self.gate, self.description
        kept.names, kept.never = self.names, self.never
        kept.kinds, kept.reason, kept.experts = self.kinds, self.reason, None
        return kept

    def still_describes(self, module, weights) -> bool:
        """Whether the weights and the activation are those that were described. A layer that could not be served is
        looked at again every time: its own path is slower than looking."""
        if self.experts is None or module._modules.get("act_fn") is not self.act_module:
            return False
        for weight in weights:
            if type(weight) not in PLAIN:
                return False
        return self.experts.matches(*weights[:2], **_biases_among(weights))


def experts_of(weights, description: str) -> Experts:
    """What to call for these weights: a layer's that some module keeps, or one described for this call alone. Keeping
    it here would keep the weights' memory, too."""
    biases = _biases_among(weights)
    layer = _by_address.get(_addresses(weights))
    if layer is not None and layer.description == description and layer.experts.matches(*weights[:2], **biases):
        return layer.experts
    return Experts(*weights[:2], **_arguments(description), **biases)


def kinds_of(weights) -> tuple:
    """What of the weights decides whether the library takes them: traced by torch.compile, so of constants alone."""
    return tuple([None if w is None else (w.dtype, w.device.type, tuple(w.shape)) for w in weights])


def _addresses(weights) -> tuple[int, ...]:
    return tuple([weight.data_ptr() for weight in weights])


@functools.lru_cache(maxsize=64)
def _arguments(description: str) -> dict:
    return json.loads(description)


def layer_of(module: torch.nn.Module) -> tuple[Layer, tuple]:
    """(the module's layer, its weights as they are now), from what is kept on the module where that still holds."""
    layer = module.__dict__.get(SLOT)
    weights, kept = weights_of(module, weight_names(module) if layer is None else layer.names)
    if layer is None or not layer.still_describes(module, weights):
        layer = Layer(module, weights, previous=layer)
        module.__dict__[SLOT] = layer if kept else layer.without_weights()
    elif not kept:  # a hook or a parametrization came after it was described
        module.__dict__[SLOT] = layer.without_weights()
    return layer, weights


def look_at(module: torch.nn.Module) -> tuple[Layer, bool]:
    """(the module's layer as it is now, whether it may be kept); nothing is."""
    weights, kept = weights_between_calls(module)
    return Layer(module, weights), kept
