"""A slot: one DLTensor, kept between calls, that a framework's array is bound to.

Describing a tensor anew costs 1.6 us in Python, changing the address in a kept description 0.1 us; so a slot remembers
what it described last, and frameworks whose arrays can be compared cheaply (torch) change the address alone.
"""

from __future__ import annotations

import math

from warpdecode._ffi import ffi

MAX_AXES = 8

# dtype name -> DLPack (code, bits). More than the library serves: it refuses the rest, with its own sentence.
DTYPES = {
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "bool": (6, 8),
    "complex64": (5, 64),
    "complex128": (5, 128),
}


class Slot:
    """One argument's DLTensor. `tensor` is what the C library reads; the rest says what it describes."""

    __slots__ = ("_shape", "_strides", "address", "device", "dtype", "keep", "name", "place", "shape", "tensor")

    def __init__(self, name: str):
        self.name = name
        self.tensor = None  # a DLTensor *, NULL-like None until first bound
        self.shape = self.dtype = self.device = None  # of the array bound last, in its framework's own terms
        self.keep = None  # what must live as long as the description
        self.address = 0  # of what was described last
        self.place = None  # where the DLTensor has its address: writing there moves the description

    def describe(self, address: int, shape, strides, dtype: str, device_type: int, device_id: int) -> None:
        """Fills the DLTensor. strides: in elements, or None for compact ones; dtype: a name of DTYPES."""
        if len(shape) > MAX_AXES:
            raise ValueError(f"{self.name}: had {len(shape)} axes, expected at most {MAX_AXES}")
        if dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype was {dtype}, expected bfloat16, float16, float32 (ids: int32, int64)")
        if self.keep is not None or self.tensor is None:  # borrowed from a capsule before, or never bound
            self.keep = None
            self.tensor = ffi.new("DLTensor *")
            self._shape = ffi.new("int64_t[]", MAX_AXES)
            self._strides = ffi.new("int64_t[]", MAX_AXES)
            self.place = ffi.cast("uintptr_t *", ffi.addressof(self.tensor, "data"))
        tensor = self.tensor
        for axis, length in enumerate(shape):
            self._shape[axis] = length
        if strides is not None:
            for axis, stride in enumerate(strides):
                self._strides[axis] = stride
        tensor.ndim = len(shape)
        tensor.shape = self._shape
        tensor.strides = ffi.NULL if strides is None else self._strides
        tensor.dtype.code, tensor.dtype.bits = DTYPES[dtype]
        tensor.dtype.lanes = 1
        tensor.device.device_type, tensor.device.device_id = device_type, device_id
        tensor.byte_offset = 0
        self.place[0] = self.address = address

    def borrow(self, tensor, keep) -> None:
        """Takes the DLTensor of a capsule; `keep` keeps it alive."""
        self.tensor, self.keep = tensor, keep
        self.address = int(ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
        self.shape = self.dtype = self.device = None

    def extent(self) -> tuple[int, int]:
        """The addresses of its first byte and of the one behind its last, of a compact array."""
        tensor = self.tensor
        first = int(ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
        elements = math.prod(tensor.shape[axis] for axis in range(tensor.ndim))
        return first, first + elements * tensor.dtype.bits // 8

    def facts(self) -> tuple[list[int], str, str]:
        """Shape, dtype and device of what is described, for comparing and for sentences."""
        tensor = self.tensor
        shape = [tensor.shape[axis] for axis in range(tensor.ndim)]
        dtype = (tensor.dtype.code, tensor.dtype.bits)
        names = [name for name, known in DTYPES.items() if known == dtype]
        device = tensor.device
        return shape, names[0] if names else f"DLPack {dtype}", f"DLPack {device.device_type}:{device.device_id}"

    def is_compact(self) -> bool:
        """Whether the strides are row-major without gaps."""
        tensor, compact = self.tensor, 1
        if tensor.strides == ffi.NULL:
            return True
        for axis in reversed(range(tensor.ndim)):
            if tensor.shape[axis] != 1 and tensor.strides[axis] != compact:
                return False
            compact *= tensor.shape[axis]
        return True
