"""JAX arrays. They are immutable, so the caller cannot pass one as `out`; the output is a fresh one.

On the CPU the output is a NumPy array handed to JAX at the end, on CUDA a fresh JAX buffer that nobody else has seen.
JAX shows no current stream. It names streams for what comes in from outside (`get_stream_for_external_ready_events`),
but another one each time, so what it would wait for is not what the kernels ran on. They run on one of them, and
`finish` waits for that one before the output is imported again: also because JAX's allocator knows nothing of it and
would hand the workspace to the next computation while the kernels still use it. Likewise every array is ready before
the kernels are enqueued, a fresh one too: JAX fills it with zeros, which on a busy GPU came after the kernels.
"""

from __future__ import annotations

import ctypes
import functools

import jax
import numpy as np

from warpdecode._ffi import lib
from warpdecode.frameworks import _capsule, _numpy
from warpdecode.slots import Slot


def _on_cuda(array):
    return next(iter(array.devices())).platform == "gpu"


def bind(slot, array, writable=False):
    """Borrow the array's DLTensor."""
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{slot.name}: was a tracer; these kernels cannot run under jax.jit, jax.vmap or jax.grad; call outside"
        )
    if writable:
        raise ValueError(f"{slot.name}: was a jax.Array, which is immutable; leave `out` away to get a fresh array")
    if array.is_deleted():
        raise ValueError(f"{slot.name}: was deleted or donated, expected a jax.Array that still has its memory")
    if len(array.devices()) != 1:
        raise ValueError(f"{slot.name}: was sharded over {len(array.devices())} devices, expected an array on one")
    array.block_until_ready()  # dispatch is asynchronous on the CPU too, and has no stream to wait on
    _capsule.bind(slot, array, False, (stream(array) or 1) if _on_cuda(array) else None)


def bind_table(slot, addresses, like):
    """NumPy memory on the CPU. On CUDA there is none: JAX has 64-bit integers only where they were asked for."""
    if _on_cuda(like):
        raise ValueError(f"{slot.name}: lists of jax.Arrays are served on the CPU alone; stack them into one array")
    return _numpy.bind_table(slot, addresses, like)


def guard(inputs, weights):
    """These arrays carry no gradients."""


def places(arrays):
    """Arrays of this framework stay where they are."""
    return None


def empty(shape, like):
    """NumPy memory on the CPU, a fresh JAX buffer on CUDA."""
    if not _on_cuda(like):
        return np.empty(shape, dtype=like.dtype)
    return _Fresh(jax.numpy.empty(shape, dtype=like.dtype, device=like.sharding).block_until_ready())


class _Fresh:
    """A JAX buffer on CUDA that only this call has, so it may be written."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return _capsule.export(self.array, keywords.get("stream"))

    def __dlpack_device__(self):
        return (int(lib.kDLCUDA), next(iter(self.array.devices())).local_hardware_id)


def empty_like(like):
    """A fresh, uninitialised array of the same shape."""
    return empty(like.shape, like)


def bind_output(slot, output):
    """Describe an output that `empty` made."""
    if isinstance(output, _Fresh):
        _capsule.bind(slot, output, False, stream(output.array) or 1)
    else:
        _numpy.bind(slot, output, True)


def workspace(size, like):
    """Device memory from JAX's allocator; `finish` waits before the call lets go of it."""
    if not _on_cuda(like):
        return _numpy.workspace(size, like)
    owner = jax.numpy.empty((size,), dtype=jax.numpy.uint8, device=like.sharding).block_until_ready()
    slot = Slot("workspace")
    _capsule.bind(slot, owner, False, stream(like) or 1)
    return slot.address, (owner, slot)


def stream(like):
    """One of the device's streams, always the same one."""
    return _stream_of(next(iter(like.devices()))) if _on_cuda(like) else 0


@functools.cache
def _stream_of(device):
    return device.get_stream_for_external_ready_events()


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")  # which JAX has loaded


def _wait(handle):
    status = _driver().cuStreamSynchronize(ctypes.c_void_p(handle))
    if status != 0:
        raise RuntimeError(f"CUDA: waiting for the kernels failed with the driver's error {status}")


def finish(output, like):
    """The output as a jax.Array on the device of `like`, and like it bound to that device or not."""
    if isinstance(output, _Fresh):
        _wait(stream(output.array))
        return jax.dlpack.from_dlpack(output).block_until_ready()
    return jax.device_put(output, like.sharding if like.committed else None)
