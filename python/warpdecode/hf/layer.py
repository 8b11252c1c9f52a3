"""One experts module: can the kernels serve it, and its description for them.

How the module is built and what its weights are is looked at once, and again when the weights are replaced. What a
single call brings is `call.py`'s.
"""

import functools
import json
import operator
import weakref

import torch

from .. import Experts, cuda_usable
from .call import PLAIN
from .forms import ABSENT, Form, Part, bound, unfit
from .found import form_of
from .gate import Gate, probe_gate
from .probing import double, probing
from .state import SLOT, holds

# Layers by their weights' addresses, for compiled code, which has the weights but no module.
_by_address: "weakref.WeakValueDictionary[tuple[int, ...], Layer]" = weakref.WeakValueDictionary()


def weights_between_calls(module: torch.nn.Module, form: Form) -> tuple[tuple, bool]:
    """(the weights of a module that is not running, whether they may be kept). Tensor and expert parallelism keep
    DTensors in it, and bring this process's part of them for the time of a call: that part is what a call will bring.
    A call that brings a DTensor is not served: nobody would sum what the processes compute."""
    weights, kept = form.weights(module, form.names(module))
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
        usable, sentence = cuda_serves()
        if not usable:
            return f"its weights are on {first.device}, and {sentence.rstrip('.')}"
    return None


# torch.compile cannot trace a call of the C library, nor need it: the answer stays for the life of the process.
@torch.compiler.assume_constant_result
def cuda_serves() -> tuple[bool, str]:
    return cuda_usable()


def _weight_against(name: str, weight) -> str | None:
    if weight is None:
        return f"it has no {name}"
    if type(weight) not in PLAIN:
        return f"{name} is a {type(weight).__name__}, not a plain torch.Tensor or Parameter"
    if weight.device.type == "meta":
        return f"{name} is {ABSENT}"
    if weight.layout is not torch.strided or not weight.is_contiguous():
        return f"{name} is not a contiguous strided tensor"
    return None


class Layer:
    """What is known about one module: `experts` to call, or the `reason` why there is none; `settled` when other
    weights would not change that, and `never` when nor would eval mode. `names` are those of its weights, which are
    given as they are now; `description` is what is known without them: the arguments of `warpdecode.Experts`, as JSON,
    because compiled code can hold strings. `before` is what was known in another state, such as eval mode."""

    __slots__ = (
        "__weakref__", "before", "cut", "description", "experts", "form", "gate", "kinds", "lists", "names", "never",
        "parts", "reason", "settled", "state", "watch",
    )  # fmt: skip

    def __init__(self, module, weights, form: Form, previous: "Layer | None" = None):
        self.experts = self.watch = self.lists = None
        self.gate: Gate | None = None
        self.description, self.parts = "", ()
        self.kinds = kinds_of(weights)
        self.form, self.names, self.state = form, form.names(module), form.state(module)
        known = _known(module, previous)
        self.before = None
        if previous is not None:  # one, not a history
            self.before = previous.before if known is previous else previous.without_weights(forgetting=True)
        self._describe(module, weights, known)
        self.never = self.settled
        if self.settled and module.training and form.against(module) is None:
            other = Layer(double(module), weights, form)
            if other.reason is None:
                self.never = False
                self.reason += " (in training mode; it can be served in eval mode)"

    def _describe(self, module, weights, known: "Layer | None") -> None:
        self.reason = self.form.against(module)
        if self.reason is None and known is None:
            self.reason = self.form.changed(module)
        self.settled = self.reason is not None
        self.reason = self.reason or weights_against(self.names, weights)
        if self.reason is not None:
            return
        # New weights, same gate: RL replaces weights every step.
        if known is None:
            with probing(weights[0].device):
                self.gate = probe_gate(self.form.gate(module), weights[0].device)
        else:
            self.gate = known.gate
        self.reason = self.gate.reason
        if self.reason is not None:
            self.settled = True
            return
        self.parts = self.form.parts(module)
        self.reason = unfit(self.parts, weights)
        if self.reason is not None:
            return
        self.cut = any([part.shape is not None for part in self.parts])
        self.lists = weights if any([part.count is not None for part in self.parts]) else None
        arguments = self.gate.arguments | self.form.arguments(module)
        self.description = json.dumps({"parts": self.parts, "arguments": arguments}, sort_keys=True)
        try:
            experts = Experts(**bound(self.parts, weights), **arguments)
        except ValueError as error:  # shapes, dtypes, alignment: the library knows its limits best and says them
            self.reason = str(error).rstrip(".")
            if known is None:
                self.gate = None  # nothing was compared yet
            return
        if known is None:
            self.reason, self.settled = self.form.difference(module, experts)
        if self.reason is None:
            self.experts, self.watch = experts, self.form.watch(module, weights)
            _by_address[_addresses(weights)] = self
        else:
            self.gate = None  # to be compared again

    def __reduce__(self):
        # A copied or unpickled module has other weights. None is "not described yet", and NoneType needs no import of
        # ours where the copy is loaded.
        return type(None), ()

    def without_weights(self, forgetting: bool = False) -> "Layer":
        """What may be kept when the weights were computed for one call: the gate, and nothing that holds them;
        `forgetting` what was before it, too."""
        kept = object.__new__(Layer)
        kept.state, kept.gate, kept.description = self.state, self.gate, self.description
        kept.before = None if forgetting else self.before
        kept.form, kept.names, kept.parts = self.form, self.names, self.parts
        kept.never, kept.settled = self.never, self.settled
        kept.kinds, kept.reason, kept.experts = self.kinds, self.reason, None
        kept.lists = kept.watch = kept.cut = None
        return kept

    def still_describes(self, module, weights) -> bool:
        """Whether the weights and the activation are those that were described. A layer that could not be served for
        its weights is looked at again every time: its own path is slower than looking."""
        if (self.experts is None and not self.settled) or not holds(self.state, module):
            return False
        if self.settled:
            return True
        if self.lists is not None:
            # Hundreds of parameters, which are the library's arguments themselves: it looks at their memory in a call.
            return _same(weights, self.lists)
        for weight in weights:
            # The library compares addresses, shapes and dtypes: a transposed view may have the same.
            if type(weight) not in PLAIN or not weight.is_contiguous():
                return False
        if self.cut and unfit(self.parts, weights) is not None:
            return False
        return self.experts.matches(**bound(self.parts, weights))


def _known(module, previous: Layer | None) -> Layer | None:
    """Of the layers that were looked at before, the one whose gate is the module's as it is now."""
    while previous is not None:
        if previous.gate is not None and previous.gate.reason is None and holds(previous.state, module):
            return previous
        previous = previous.before
    return None


def _same(some: tuple, others: tuple) -> bool:
    """Whether these are the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def experts_of(weights, description: str) -> Experts:
    """What to call for these weights: a layer's that some module keeps, or one described for this call alone. Keeping
    it here would keep the weights' memory, too."""
    parts, arguments = _described(description)
    arrays = bound(parts, weights)
    layer = _by_address.get(_addresses(weights))
    if layer is not None and layer.description == description and layer.experts.matches(**arrays):
        return layer.experts
    return Experts(**arrays, **arguments)


def kinds_of(weights) -> tuple:
    """What of the weights decides whether the library takes them: traced by torch.compile, so of constants alone."""
    return tuple([None if w is None else (w.dtype, w.device.type, tuple(w.shape)) for w in weights])


def _addresses(weights) -> tuple[int, ...]:
    return tuple([weight.data_ptr() for weight in weights])


@functools.lru_cache(maxsize=64)
def _described(description: str) -> tuple[tuple[Part, ...], dict]:
    found = json.loads(description)
    return tuple([Part(*part) for part in found["parts"]]), found["arguments"]


def layer_of(module: torch.nn.Module) -> tuple[Layer, tuple]:
    """(the module's layer, its weights as they are now), from what is kept on the module where that still holds."""
    layer = module.__dict__.get(SLOT)
    if layer is not None and layer.watch is not None and layer.watch.sees_no_change(module):
        return layer, layer.lists
    if layer is None:
        form = form_of(module)
        weights, kept = form.weights(module, form.names(module))
    else:
        form = layer.form
        weights, kept = form.weights(module, layer.names)
    if layer is None or not layer.still_describes(module, weights):
        layer = Layer(module, weights, form, previous=layer)
        module.__dict__[SLOT] = layer if kept else layer.without_weights()
    elif not kept:  # a hook or a parametrization came after it was described
        module.__dict__[SLOT] = layer.without_weights()
    return layer, weights


def look_at(module: torch.nn.Module, form: Form, anew: bool = False) -> tuple[Layer, bool]:
    """(the module's layer as it is now, whether it may be kept); nothing is. What was found by running the module is
    found `anew`, or taken from what is kept where that still holds."""
    weights, kept = weights_between_calls(module, form)
    return Layer(module, weights, form, None if anew else module.__dict__.get(SLOT)), kept
