"""DLPack capsules: the way in for every producer without an adapter of its own."""

from __future__ import annotations

import ctypes

from warpdecode._ffi import ffi

# PyCapsule_GetPointer and PyCapsule_IsValid through ctypes.pythonapi, which keeps the GIL (cffi would drop it).
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_READ_ONLY = 1


def export(array, stream):
    """The producer's capsule, of DLPack 1 where it knows that. stream: as `__dlpack__` wants it, None on the CPU."""
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # a producer of before DLPack 1
        return array.__dlpack__(stream=stream)


def bind(slot, array, writable, stream):
    """Borrow the capsule's DLTensor; the slot keeps the capsule, whose destructor releases the producer's memory."""
    try:
        capsule = export(array, stream)
    except Exception as error:  # every producer has its own reasons and its own exceptions for them
        raise ValueError(f"{slot.name}: gave no DLPack capsule: {type(error).__name__}: {error}") from error
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = ffi.cast("DLManagedTensorVersioned *", _get_pointer(capsule, b"dltensor_versioned"))
        if managed.version.major != 1:
            raise ValueError(f"{slot.name}: speaks DLPack {managed.version.major}, expected 1")
        if writable and managed.flags & _READ_ONLY:
            raise ValueError(f"{slot.name}: was read-only, expected a writable array")
    elif _is_valid(capsule, b"dltensor"):
        managed = ffi.cast("DLManagedTensor *", _get_pointer(capsule, b"dltensor"))
    else:
        raise ValueError(f"{slot.name}: gave no DLPack capsule, but a {type(capsule).__qualname__}")
    slot.borrow(ffi.addressof(managed.dl_tensor), capsule)
