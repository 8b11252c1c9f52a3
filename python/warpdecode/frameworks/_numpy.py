"""NumPy arrays, bfloat16 (of ml_dtypes) included, which NumPy's own DLPack export refuses."""

from __future__ import annotations

import numpy as np

from warpdecode._ffi import lib


def bind(slot, array, writable=False):
    """Describe an array in place."""
    if writable and not array.flags.writeable:
        raise ValueError(f"{slot.name}: was read-only, expected a writable array")
    if array.dtype.byteorder == ">":
        raise ValueError(f"{slot.name}: was big-endian, expected the machine's byte order")
    strides = None
    if not array.flags.c_contiguous:
        itemsize = max(array.itemsize, 1)
        if any(stride % itemsize for stride in array.strides):
            raise ValueError(f"{slot.name}: strides were {array.strides} bytes, expected multiples of the element size")
        strides = [stride // itemsize for stride in array.strides]
    slot.describe(array.ctypes.data, array.shape, strides, array.dtype.name, lib.kDLCPU, 0)


def bind_table(slot, addresses, like):
    """An array of int64."""
    owner = np.array(addresses, dtype=np.int64)
    bind(slot, owner)
    return owner


def guard(inputs, weights):
    """These arrays carry no gradients."""


def places(arrays):
    """Arrays of this framework stay where they are."""
    return None


def empty(shape, like):
    """A fresh, uninitialised array."""
    return np.empty(shape, dtype=like.dtype)


def empty_like(like):
    """A fresh, uninitialised array of the same shape."""
    return empty(like.shape, like)


def bind_output(slot, output):
    """Describe an output that `empty` made."""
    bind(slot, output, writable=True)


def wrote(out):
    """Arrays of this framework count no writes."""


def workspace(size, like):
    """NumPy promises no alignment: cut the first aligned bytes out of a larger array."""
    owner = np.empty(size + 64, dtype=np.uint8)
    address = owner.ctypes.data
    return address + -address % 64, owner


def stream(like):
    """No streams on the CPU."""
    return 0


def finish(output, like):
    """Nothing to do."""
    return output
