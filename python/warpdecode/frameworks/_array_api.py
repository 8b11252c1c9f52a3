"""CuPy and every other array that speaks DLPack and the array API standard (`__array_namespace__`)."""

from __future__ import annotations

from warpdecode._ffi import lib
from warpdecode.frameworks import _capsule, _numpy
from warpdecode.slots import Slot

_CUDA = int(lib.kDLCUDA)
_LEGACY_DEFAULT = 1  # DLPack's name for CUDA's legacy default stream, which is 0 to CUDA itself


def _namespace(array):
    if not hasattr(array, "__array_namespace__"):
        raise ValueError(
            f"out: must be given for a {type(array).__module__}.{type(array).__qualname__}, which has no "
            "__array_namespace__() to make one with"
        )
    return array.__array_namespace__()


def stream(like):
    """The current stream of the array's framework."""
    if int(like.__dlpack_device__()[0]) != _CUDA:
        return 0
    if type(like).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy.cuda.get_current_stream().ptr
    raise ValueError(
        f"hidden_states: was a CUDA array of {type(like).__module__}, whose current stream is unknown here; expected "
        "torch, CuPy or JAX, or memory on the CPU"
    )


def bind(slot, array, writable=False):
    """Borrow the array's DLTensor, ordered behind its producer on the current stream."""
    on_cuda = int(array.__dlpack_device__()[0]) == _CUDA
    _capsule.bind(slot, array, writable, (stream(array) or _LEGACY_DEFAULT) if on_cuda else None)


def guard(**arrays):
    """These arrays carry no gradients."""


def moved(slot, array):
    """An array of this framework stays where it is."""
    return False


def hold(array):
    """What keeps the described memory alive."""
    return array


def empty(shape, like):
    """A fresh, uninitialised array of the same framework."""
    return _namespace(like).empty(shape, dtype=like.dtype, device=like.device)


def empty_like(like):
    """A fresh, uninitialised array of the same shape."""
    return empty(like.shape, like)


def bind_output(slot, output):
    """Describe an output that `empty` made."""
    bind(slot, output, writable=True)


def workspace(size, like):
    """From the framework's own allocator on CUDA, where memory is aligned; plain memory on the CPU."""
    if int(like.__dlpack_device__()[0]) != _CUDA:
        return _numpy.workspace(size, like)
    xp = _namespace(like)
    owner = xp.empty(size, dtype=xp.uint8, device=like.device)
    slot = Slot("workspace")
    bind(slot, owner)
    return slot.address, (owner, slot)


def finish(output):
    """Nothing to do."""
    return output
