"""The kernels in the place of transformers' `batched_mm`, which `generate()` chooses by itself for the decode loop."""

from collections.abc import Callable

from .config import ModelPolicies
from .forward import report_fp8, serve
from .registries import ALL_EXPERTS_FUNCTIONS, FORWARD, FP8_FORWARD, demand_interface

REPLACED = "batched_mm"

_calls: list["DecodeAcceleration"] = []  # whose acceleration goes on, the last one's `strict` counting


class DecodeAcceleration:
    """What `accelerate_decode` returned: `undo()` ends the acceleration; as a context manager its end ends this call's
    alone, and what an earlier call began goes on with its own `strict`. A handle serves once: entered after its end it
    raises RuntimeError."""

    def __init__(self, strict: bool):
        self.strict = strict

    def undo(self) -> None:
        """Puts transformers' own functions back, whoever's call it was. Does nothing when that was done already."""
        _calls.clear()
        _switch(None)

    def __enter__(self) -> "DecodeAcceleration":
        if self not in _calls:
            raise RuntimeError("warpdecode: this acceleration has ended; call accelerate_decode() again")
        return self

    def __exit__(self, *exception) -> None:
        if self in _calls:  # not undone inside
            _calls.remove(self)
            _switch(_calls[-1].strict if _calls else None)

    def __repr__(self) -> str:
        return f"<warpdecode.hf.accelerate_decode(): {'off' if is_on() is None else 'on'}>"


def accelerate_decode(*, strict: bool = False) -> DecodeAcceleration:
    """Lets the kernels serve every call for which transformers would use its implementation `batched_mm`.

    On a GPU `generate()` switches models from `grouped_mm`, their default, to `batched_mm` for the decode loop. With
    this call that loop runs on the kernels, for every model of the process, with no change to the models or to the
    code that uses them; prefill stays on `grouped_mm`. Calls the kernels cannot serve go to the original `batched_mm`,
    which is said once per model and reason; with `strict=True` they raise `WarpDecodeFallbackError`. FP8 experts have
    a registry of their own, whose `batched_mm` is treated alike; the kernels serve none of them so far.

    Raises RuntimeError with transformers 4, which has no experts interface.

    Calling it again changes `strict` and nothing else. Undone by the returned handle: `undo()`, or the end of `with`.
    """
    demand_interface("accelerate_decode()", "5.0")
    call = DecodeAcceleration(strict)
    _calls.append(call)
    _switch(strict)
    return call


def is_on() -> bool | None:
    """None when the acceleration is off, otherwise its `strict`."""
    function = FORWARD.get(REPLACED)
    return function.strict if isinstance(function, _InPlaceOf) else None


def is_hidden() -> bool:
    """Whether another function is set under the name on transformers' interface object itself, which goes first."""
    return not isinstance(ALL_EXPERTS_FUNCTIONS[REPLACED], _InPlaceOf)


def _switch(strict: bool | None) -> None:
    for registry, forward in ((FORWARD, _decode_forward), (FP8_FORWARD, _fp8_decode_forward)):
        if registry is None or REPLACED not in registry:
            continue
        current = registry[REPLACED]
        original = current.in_place_of if isinstance(current, _InPlaceOf) else current
        registry[REPLACED] = original if strict is None else _InPlaceOf(forward, original, strict)


class _InPlaceOf:
    """A function of ours registered under another's name, and the `Caller` of what it serves."""

    def __init__(self, forward: Callable, original: Callable, strict: bool):
        self.in_place_of, self.strict = original, strict
        self._forward, self._policies = forward, ModelPolicies(strict)

    def __call__(self, module, *args, **kwargs):
        return self._forward(self, module, *args, **kwargs)

    def policy(self, module):
        return self._policies.of(module)

    def key(self, module):
        return self._policies.while_compiling.key

    def own_name(self, module):
        return REPLACED

    def own_path(self, module):
        return self.in_place_of


def _decode_forward(caller: _InPlaceOf, module, hidden_states, top_k_index, top_k_weights):
    return serve(module, (hidden_states, top_k_index, top_k_weights), caller)


def _fp8_decode_forward(caller: _InPlaceOf, module, *args, **kwargs):
    report_fp8(module, caller, REPLACED)
    return caller.in_place_of(module, *args, **kwargs)
