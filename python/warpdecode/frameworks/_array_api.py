"""Every other array that speaks DLPack; outputs through the array API standard (`__array_namespace__`).

CPU memory only: a framework without an adapter of its own does not say which stream is current.
"""

from __future__ import annotations

from warpdecode._ffi import lib
from warpdecode.frameworks import _capsule, _numpy

_CUDA = int(lib.kDLCUDA)


def _namespace(array):
    if not hasattr(array, "__array_namespace__"):
        raise ValueError(
            f"out: must be given for a {type(array).__module__}.{type(array).__qualname__}, which has no "
            "__array_namespace__() to make one with"
        )
    return array.__array_namespace__()


def stream(like):
    """No streams on the CPU."""
    return 0


def bind(slot, array, writable=False):
    """Borrow the array's DLTensor."""
    if int(array.__dlpack_device__()[0]) == _CUDA:
        raise ValueError(
            f"{slot.name}: was a CUDA array of {type(array).__module__}, whose current stream is unknown here; "
            "expected torch, CuPy or JAX, or memory on the CPU"
        )
    _capsule.bind(slot, array, writable, None)


def guard(inputs, weights):
    """These arrays carry no gradients."""


def places(arrays):
    """Arrays of this framework stay where they are."""
    return None


def empty(shape, like):
    """A fresh, uninitialised array of the same framework."""
    return _namespace(like).empty(shape, dtype=like.dtype, device=like.device)


def empty_like(like):
    """A fresh, uninitialised array of the same shape."""
    return _namespace(like).empty(like.shape, dtype=like.dtype, device=like.device)


def bind_output(slot, output):
    """Describe an output that `empty` made."""
    bind(slot, output, writable=True)


def wrote(out):
    """Arrays of this framework count no writes."""


workspace = _numpy.workspace
bind_table = _numpy.bind_table


def finish(output, like):
    """Nothing to do."""
    return output
