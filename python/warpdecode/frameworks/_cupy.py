"""CuPy arrays: through their DLPack capsules, on CuPy's current stream."""

from __future__ import annotations

import cupy

from warpdecode.frameworks import _capsule

_LEGACY_DEFAULT = 1  # DLPack's name for CUDA's legacy default stream, which is 0 to CUDA itself


def bind(slot, array, writable=False):
    """Borrow the array's DLTensor, ordered on the current stream."""
    _capsule.bind(slot, array, writable, stream(array) or _LEGACY_DEFAULT)


def bind_table(slot, addresses, like):
    """An array of int64 beside the weights; the copy to the device has ended when this returns."""
    with like.device:
        owner = cupy.array(addresses, dtype=cupy.int64)
        cupy.cuda.get_current_stream().synchronize()
    bind(slot, owner)
    return owner


def guard(inputs, weights):
    """CuPy arrays carry no gradients."""


def places(arrays):
    """CuPy arrays stay where they are."""
    return None


def empty(shape, like):
    """A fresh, uninitialised array on the device of `like`."""
    with like.device:
        return cupy.empty(shape, dtype=like.dtype)


def empty_like(like):
    """The same with the shape of `like`."""
    return empty(like.shape, like)


def bind_output(slot, output):
    """Describe an output that `empty` made."""
    bind(slot, output, writable=True)


def wrote(out):
    """Arrays of this framework count no writes."""


def workspace(size, like):
    """From CuPy's memory pool, in the order of the current stream."""
    with like.device:
        owner = cupy.empty(size, dtype=cupy.uint8)
    return owner.data.ptr, owner


def stream(like):
    """CuPy's current stream on the array's device."""
    with like.device:
        return cupy.cuda.get_current_stream().ptr


def finish(output, like):
    """Nothing to do."""
    return output
