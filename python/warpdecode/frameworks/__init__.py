"""How each framework's arrays reach the C library, and how outputs are made in the caller's framework.

An adapter is a module with these functions:

    bind(slot, array, writable)   describe the array in the slot; writable: the caller's `out`
    wrote(out)                    the call has written the caller's `out`
    bind_output(slot, output)     describe an output that `empty` made
    empty(shape, like)            a fresh output with the dtype and device of `like`
    empty_like(like)              the same with the shape of `like`
    workspace(size, like)         (address, owner) of `size` bytes on the device of `like`, aligned to 16 bytes
    stream(like)                  the caller's current stream on the device of `like`, as an integer
    finish(output, like)          what the caller gets for an array that `empty` made
    guard(inputs, weights)        refuse arrays (by name) for which a derivative or a trace would have to be recorded
    bind_table(slot, addresses, like)   describe a table of addresses on the device of `like`; returns what owns it
    places(arrays)                where these weights are, to be compared before each call; None: they never move

Adapters are chosen by the exact type of an array and loaded when the first one arrives, so that no framework is ever
imported that the caller does not use.
"""

from __future__ import annotations

import importlib

_MODULES = {
    ("numpy", "ndarray"): "_numpy",
    ("numpy", "memmap"): "_numpy",
    ("torch", "Tensor"): "_torch",
    ("torch.nn.parameter", "Parameter"): "_torch",
    ("torch.nn.parameter", "Buffer"): "_torch",
}
# Their other subclasses may hide or compute elements, which their memory does not show.
_PLAIN = {
    ("numpy", "ndarray"): "masked arrays: filled(), others: numpy.asarray()",
    ("torch", "Tensor"): "DTensor: pass to_local(), quantised tensors: dequantise",
}
_adapters: dict[type, object] = {}


def adapter_of(array, name: str):
    """The adapter module for an array; ValueError, naming the argument, where there is none."""
    kind = type(array)
    adapter = _adapters.get(kind)
    return adapter if adapter is not None else _find(kind, name)


def _find(kind: type, name: str):
    module = _MODULES.get((kind.__module__, kind.__qualname__))
    if module is None:
        for base in kind.__mro__[1:]:
            plain = f"{base.__module__}.{base.__qualname__}"
            if (base.__module__, base.__qualname__) in _PLAIN:
                raise ValueError(
                    f"{name}: was a {kind.__module__}.{kind.__qualname__}, a subclass of {plain} that may compute its "
                    f"elements; expected a plain {plain} ({_PLAIN[base.__module__, base.__qualname__]})"
                )
        root = kind.__module__.partition(".")[0]
        if root in ("jax", "jaxlib"):
            module = "_jax"
        elif root == "cupy":
            module = "_cupy"
        elif hasattr(kind, "__dlpack__"):
            module = "_array_api"
        else:
            raise ValueError(
                f"{name}: was a {kind.__module__}.{kind.__qualname__}, expected an array that speaks DLPack "
                "(torch, NumPy, JAX, CuPy, ...), or for weights a list of them"
            )
    adapter = importlib.import_module(f"warpdecode.frameworks.{module}")
    _adapters[kind] = adapter
    return adapter
