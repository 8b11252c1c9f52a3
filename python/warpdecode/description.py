"""A layer's description: the C struct of its experts, what it points to, and whether it still holds."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

from warpdecode._ffi import OK, check, ffi, lib, new_struct
from warpdecode.frameworks import adapter_of
from warpdecode.slots import Slot

ACTIVATIONS = {
    "silu": lib.WD_ACTIVATION_SILU,
    "gelu_tanh": lib.WD_ACTIVATION_GELU_TANH,
    "gelu": lib.WD_ACTIVATION_GELU,
    "relu": lib.WD_ACTIVATION_RELU,
    "relu2": lib.WD_ACTIVATION_RELU2,
}
FLAGS = {False: 0, True: 1}
TRANSPOSED = {False: lib.WD_TRANSPOSED_NONE, True: lib.WD_TRANSPOSED_ALL, "down": lib.WD_TRANSPOSED_DOWN}

# The parts of a layer that are arrays, and the struct's field for a table of addresses in their place.
TABLES = {
    "gate_up_proj": "gate_up_pointers",
    "down_proj": "down_pointers",
    "up_proj": "up_pointers",
    "gate_up_bias": "gate_up_bias_pointers",
    "up_bias": "up_bias_pointers",
    "down_bias": "down_bias_pointers",
}

_CUDA_ALIGNMENT = 16


def _number(name: str, value, expected: str, allowed: Callable[[float], bool]) -> float:
    """The number as the C struct has it: in float32, where 1e-46 is 0, which would mean none, and 1e39 is infinite."""
    try:
        # float() would read a text
        if not isinstance(value, (str, bytes)) and allowed(number := ctypes.c_float(value).value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: was {value!r}, expected {expected}")


def _choice(name: str, value, choices: dict):
    if not isinstance(value, (bool, str)) or value not in choices:
        raise ValueError(f"{name}: was {value!r}, expected one of {', '.join(map(repr, choices))}")
    return choices[value]


def struct_fields(
    *, activation, is_transposed, is_interleaved, has_gate, alpha, limit, clamp_after_activation, up_offset,
    weight_on_input,
) -> dict:  # fmt: skip
    """The fields of the C struct for these keywords of `Experts`. Raises ValueError for what they may not be; which of
    them go together, the C library knows, except of those that are None here where they are 0 there."""
    fields = {
        "activation": _choice("activation", activation, ACTIVATIONS),
        "is_transposed": _choice("is_transposed", is_transposed, TRANSPOSED),
        "is_interleaved": _choice("is_interleaved", is_interleaved, FLAGS),
        "no_gate": 1 - _choice("has_gate", has_gate, FLAGS),
        "weight_on_input": _choice("weight_on_input", weight_on_input, FLAGS),
        "clamp_after_activation": _choice("clamp_after_activation", clamp_after_activation, FLAGS),
        "up_offset": _number("up_offset", up_offset, "a finite float32 number", math.isfinite),
    }
    if limit is not None:
        positive = "a float32 number above 0, or None for none"
        fields["limit"] = _number("limit", limit, positive, lambda number: number > 0)
        if not has_gate:
            raise ValueError(f"limit: was {limit!r}, expected None with has_gate=False")
    if alpha is not None:
        finite = "a finite float32 number above 0, or None for 1"
        fields["alpha"] = _number("alpha", alpha, finite, lambda number: 0 < number < math.inf)
        if activation != "silu":
            raise ValueError(f"alpha: was {alpha!r}, expected None with activation {activation!r}: silu alone has it")
    return fields


class Part:
    """One part of a layer, an array or a tuple of one array an expert, described."""

    __slots__ = ("members", "slots", "table", "table_owner")

    def __init__(self, name: str, array):
        self.members = array if isinstance(array, tuple) else (array,)
        self.table = self.table_owner = None
        if not isinstance(array, tuple):
            self.slots = [Slot(name)]
            adapter_of(array, name).bind(self.slots[0], array)
            return
        if not array:
            raise ValueError(f"{name}: was empty, expected an array for each expert")
        self.slots = [Slot(f"{name}[{i}]") for i in range(len(array))]
        adapter = adapter_of(array[0], self.slots[0].name)
        for slot, member in zip(self.slots, array, strict=True):
            if adapter_of(member, slot.name) is not adapter:
                raise ValueError(f"{slot.name}: was a {type(member)}, expected a {type(array[0])} as {name}[0]")
            adapter.bind(slot, member)
            _check_member(slot, self.slots[0])
        self.table = Slot(TABLES[name])
        self.table_owner = adapter.bind_table(self.table, [slot.address for slot in self.slots], array[0])

    def is_of(self, array) -> bool:
        """Whether these torch tensors are what was described: same memory, shapes and dtypes."""
        members = array if isinstance(array, (tuple, list)) else (array,)
        return len(members) == len(self.slots) and all(
            member.data_ptr() == slot.address and member.shape == slot.shape and member.dtype is slot.dtype
            for slot, member in zip(self.slots, members, strict=True)
        )


def _check_member(slot: Slot, first: Slot) -> None:
    """The C library sees one member and the addresses of the others, so these are compared with the first here."""
    for what, was, expected in zip(("shape", "dtype", "device"), slot.facts(), first.facts(), strict=True):
        if was != expected:
            raise ValueError(f"{slot.name}: {what} was {was}, expected {expected} as {first.name}")
    if not slot.is_compact():
        strides = [slot.tensor.strides[axis] for axis in range(slot.tensor.ndim)]
        expected = "expected compact row-major ones; pass a contiguous array"
        raise ValueError(f"{slot.name}: strides were {strides}, {expected}")
    tensor = slot.tensor
    itemsize = tensor.dtype.bits // 8
    alignment = _CUDA_ALIGNMENT if tensor.device.device_type == lib.kDLCUDA else itemsize
    if slot.address % alignment:
        raise ValueError(
            f"{slot.name}: data was {slot.address % alignment} bytes past a multiple of {alignment}, expected an "
            f"address aligned to {alignment} bytes"
        )


def _check_layer(struct) -> None:
    """Refuses bad weights here, not in a call, and says so where they are good ones of another layout."""
    size = ffi.new("size_t *")
    try:
        check(lib.wd_moe_workspace_size(struct, 1, 1, size))
    except ValueError as error:
        for value, struct.is_transposed in TRANSPOSED.items():
            if lib.wd_moe_workspace_size(struct, 1, 1, size) == OK:
                raise ValueError(f"{error} (with is_transposed={value!r} these shapes fit)") from None
        raise


class Description:
    """The C struct of a layer and what it points to. Never changed once made: running calls may be reading it."""

    __slots__ = ("_placed", "_scattered", "hidden", "intermediate", "members", "on_cpu", "parts", "struct")

    def __init__(self, arrays: dict, properties: dict):
        self.parts = {name: Part(name, array) for name, array in arrays.items()}
        struct = self.struct = new_struct("wd_moe_experts")
        for name, part in self.parts.items():
            setattr(struct, name, part.slots[0].tensor)
            if part.table is not None:
                setattr(struct, TABLES[name], part.table.tensor)
        for name, value in properties.items():
            setattr(struct, name, value)
        matrix = self.parts["gate_up_proj"].slots[0].tensor
        self.on_cpu = matrix.device.device_type != lib.kDLCUDA
        _check_layer(struct)
        sizes = matrix.shape[matrix.ndim - 2], matrix.shape[matrix.ndim - 1]
        rows, self.hidden = sizes[::-1] if struct.is_transposed == lib.WD_TRANSPOSED_ALL else sizes
        self.intermediate = rows if struct.no_gate or "up_proj" in self.parts else rows // 2
        self.members = {
            slot.name: member
            for part in self.parts.values()
            for slot, member in zip(part.slots, part.members, strict=True)
        }
        lists = [part.slots for part in self.parts.values() if part.table is not None]
        self._scattered = [(slot, *slot.extent()) for slots in lists for slot in slots]
        of_adapters = {}
        for name, member in self.members.items():
            of_adapters.setdefault(adapter_of(member, name), []).append(member)
        placed = [(adapter.places, members, adapter.places(members)) for adapter, members in of_adapters.items()]
        self._placed = [each for each in placed if each[2] is not None]

    def check_apart(self, output: Slot) -> None:
        """Refuses an output in the memory of an array in a list: the C library sees where the others are, and compares
        those itself."""
        if not self._scattered:
            return
        first, behind = output.extent()
        for slot, start, end in self._scattered:
            if first < end and start < behind:
                raise ValueError(f"{output.name}: overlaps {slot.name} in memory, expected memory of its own")

    def holds(self) -> bool:
        """Whether every array is still where it was described."""
        for places, members, known in self._placed:  # noqa: SIM110 - twice as fast as all(), and on every call
            if places(members) != known:
                return False
        return True
