"""What is timed of this library: the layer, its two kernels alone, and the read ceilings of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import warpdecode
from warpdecode._ffi import check, ffi, lib, new_struct
from warpdecode.bench import layouts
from warpdecode.bench.layers import Layers
from warpdecode.frameworks import adapter_of
from warpdecode.slots import Slot


@dataclass
class Candidate:
    """A round of calls. flops: useful floating-point operations of one of them; 0 for one that computes nothing."""

    calls: list[Callable]
    flops: float = 0
    capturable: bool = True  # in a CUDA graph
    required: bool = False  # where another fails, it is reported and left out


def flops(layers: Layers, tokens: int) -> float:
    """Multiplications and additions of a call's three projections."""
    shape = layers.shape
    return 6.0 * tokens * shape.top_k * shape.hidden * shape.intermediate


def _described(layers: Layers, kernel: str | None) -> list:
    return [
        warpdecode.Experts(gate_up, down, activation=layers.shape.activation, kernel=kernel)
        for gate_up, down in zip(layers.gate_up, layers.down, strict=True)
    ]


def layer(layers: Layers, inputs: list, kernel: str | None) -> Candidate:
    """The whole layer, by the kernel that the library would choose or by a row of its table."""
    return _whole(layers, _described(layers, kernel), inputs, required=kernel is None)


def in_layout(layers: Layers, inputs: list, layout: str) -> Candidate:
    """The whole layer in another layout, by the kernel that the library would choose."""
    return _whole(layers, layouts.described(layers, layout), inputs, required=False)


def _whole(layers: Layers, described: list, inputs: list, *, required: bool) -> Candidate:
    return Candidate(
        [lambda i=i, call=call: described[i % layers.copies](*call) for i, call in enumerate(inputs)],
        flops(layers, len(inputs[0][0])),
        required=required,
    )


def parts(layers: Layers, inputs: list) -> dict[str, Candidate]:
    """The two kernels alone; each down has the intermediate of its own call."""
    described = _described(layers, None)
    gate_up, down = [], []
    for i, (x, ids, weights) in enumerate(inputs):
        experts = described[i % layers.copies]
        intermediate = warpdecode.moe_gate_up_3d_batched(experts, x, ids)
        gate_up.append(lambda experts=experts, x=x, ids=ids: warpdecode.moe_gate_up_3d_batched(experts, x, ids))
        down.append(
            lambda experts=experts, intermediate=intermediate, ids=ids, weights=weights: warpdecode.moe_down_3d_batched(
                experts, intermediate, ids, weights
            )
        )
    total = flops(layers, len(inputs[0][0]))
    return {"gate_up": Candidate(gate_up, total * 2 / 3), "down": Candidate(down, total / 3)}


def read_memory(memory: torch.Tensor, sink: torch.Tensor) -> Callable:
    """A function that reads the tensor's bytes once (wd_read_memory), for the ceiling."""
    adapter, slot = adapter_of(memory, "memory"), Slot("memory")
    adapter.bind(slot, memory)
    options, pool = new_struct("wd_options"), None
    if not memory.is_cuda:
        pool = options.threads = warpdecode.threads.pool()
    place = ffi.cast("void *", sink.data_ptr())

    def read(pool=pool, sink=sink):  # held as long as the function that uses them
        stream = ffi.cast("void *", adapter.stream(memory))
        check(lib.wd_read_memory(slot.tensor, place, stream, options))

    return read


def ceiling(layers: Layers, distinct: list[int], sink: torch.Tensor, *, split: bool) -> Candidate:
    """Reads as many bytes as the call's distinct experts have, from the copy that the call uses, once, by one kernel.

    split: by two kernels, of the sizes that gate_up and down have (2/3 and 1/3), the honest ceiling of a small call.
    """
    reads = []
    for i, experts in enumerate(distinct):
        copy = i % layers.copies
        first = (7 * i) % (layers.shape.experts - experts + 1)  # not always the same experts, as routings do
        if split:
            pair = [read_memory(part[copy][first : first + experts], sink) for part in (layers.gate_up, layers.down)]
            reads.append(lambda pair=pair: [read() for read in pair])
        else:
            words = layers.expert_bytes // layers.dtype.itemsize
            reads.append(read_memory(layers.flat[copy][first * words : (first + experts) * words], sink))
    return Candidate(reads, required=True)
