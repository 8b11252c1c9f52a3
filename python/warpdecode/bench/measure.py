"""The measurement of one layer: cold weights, fresh routings, every candidate on the same inputs."""

from __future__ import annotations

import functools

import torch

import warpdecode
from warpdecode._ffi import check, ffi, lib, new_struct
from warpdecode.bench import peers as peer_paths
from warpdecode.bench.timers import CpuTimer, CudaTimer
from warpdecode.frameworks import adapter_of
from warpdecode.shapes import Shape
from warpdecode.slots import Slot


class Layers:
    """Copies of one layer, together larger than four times the last-level cache, and fresh routings for each call."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, cache_bytes: int, generator: torch.Generator):
        itemsize = torch.empty((), dtype=dtype).element_size()
        layer_bytes = shape.experts * shape.bytes_per_expert(itemsize)
        self.shape, self.dtype, self.device, self.generator = shape, dtype, device, generator
        self.copies = max(2, -(-4 * cache_bytes // layer_bytes))
        self.gate_up = [self._draw(2 * shape.intermediate, shape.hidden) for _ in range(self.copies)]
        self.down = [self._draw(shape.hidden, shape.intermediate) for _ in range(self.copies)]

    def _draw(self, rows, columns):
        size = (self.shape.experts, rows, columns)
        return torch.randn(size, device=self.device, dtype=self.dtype).mul_(columns**-0.5)

    def tokens(self, tokens: int, routing: str):
        """(hidden_states, topk_ids, topk_weights); distinct experts per token, as a router gives them."""
        shape = self.shape
        odds = torch.ones(shape.experts)
        if routing == "zipf":  # popularity falls with the rank; which experts are popular is drawn per call
            odds = (1.0 / torch.arange(1, shape.experts + 1))[torch.randperm(shape.experts, generator=self.generator)]
        ids = torch.multinomial(odds.expand(tokens, -1), shape.top_k, generator=self.generator)
        x = torch.randn(tokens, shape.hidden, generator=self.generator).to(self.dtype)
        weights = torch.rand(tokens, shape.top_k, generator=self.generator)
        return x.to(self.device), ids.to(self.device), (weights / weights.sum(1, keepdim=True)).to(self.device)


def read_memory(memory: torch.Tensor, sink: torch.Tensor):
    """A function that reads the tensor's bytes once (wd_read_memory), for the ceiling."""
    adapter, slot = adapter_of(memory, "memory"), Slot("memory")
    adapter.bind(slot, memory)
    options, pool = new_struct("wd_options"), None
    if not memory.is_cuda:
        pool = options.threads = warpdecode.threads.pool()
    place = ffi.cast("void *", sink.data_ptr())

    def read(pool=pool):  # held as long as the function that uses it
        stream = ffi.cast("void *", adapter.stream(memory))
        check(lib.wd_read_memory(slot.tensor, place, stream, options))

    return read


def reference(x, ids, weights, gate_up, down, activation: str) -> torch.Tensor:
    """The layer in float64, by torch on the CPU; independent of the library."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    x, weights = x.double().cpu(), weights.double().cpu()
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    act = torch.nn.functional.silu if activation == "silu" else gelu
    for token in range(x.shape[0]):
        for slot, expert in enumerate(ids[token].tolist()):
            gate, up = (gate_up[expert].double().cpu() @ x[token]).chunk(2)
            out[token] += weights[token, slot] * (down[expert].double().cpu() @ (act(gate) * up))
    return out


def measure(shape, dtype_name, tokens_list, device, routing, kernels, *, repeats, peers, seed):
    """Yields one row (a dict, ready for JSON) per number of tokens."""
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(seed)
    timer = CudaTimer(repeats) if device == "cuda" else CpuTimer(repeats)
    layers = Layers(shape, dtype, device, timer.cache_bytes, generator)
    itemsize = layers.gate_up[0].element_size()
    sink = torch.empty(16, dtype=torch.uint8, device=device)
    with torch.no_grad():
        for tokens in tokens_list:
            calls = max(timer.calls, layers.copies)
            inputs = [layers.tokens(tokens, routing) for _ in range(calls)]
            distinct = [len(torch.unique(ids)) for _, ids, _ in inputs]
            candidates = {"warpdecode": _ours(layers, inputs, None)}
            for name in kernels:
                candidates[name] = _ours(layers, inputs, name)
            candidates["read ceiling"] = _ceiling(layers, distinct, sink, shape, itemsize, split=False)
            candidates["two reads"] = _ceiling(layers, distinct, sink, shape, itemsize, split=True)
            peer_names = []
            if peers:
                for name, calls_of_peer in peer_paths.transformers_paths(layers, inputs, tokens).items():
                    candidates[name] = calls_of_peer
                    peer_names.append(name)
            x, ids, weights = inputs[0]
            some = slice(0, min(tokens, 4))  # the reference is slow
            expected = reference(x[some], ids[some], weights[some], layers.gate_up[0], layers.down[0], shape.activation)
            outputs = {name: candidates[name][0]() for name in ("warpdecode", *peer_names)}
            errors = {name: _relative(out[some], expected) for name, out in outputs.items()}
            yield {
                "shape": shape.name, "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden,
                "intermediate": shape.intermediate, "dtype": dtype_name, "device": device, "routing": routing,
                "tokens": tokens,
                "distinct_bytes": sum(distinct) // len(distinct) * shape.bytes_per_expert(itemsize),
                "gross_bytes": tokens * shape.top_k * shape.bytes_per_expert(itemsize),
                "peers": peer_names,
                "error": errors.pop("warpdecode"), "peer_errors": errors,
                "rounding_floor": _relative(expected.to(dtype), expected),
                "microseconds": timer.time(candidates),
            }  # fmt: skip


def _relative(found, expected):
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def _ours(layers, inputs, kernel):
    activation = layers.shape.activation
    described = [
        warpdecode.Experts(gate_up, down, activation=activation, kernel=kernel)
        for gate_up, down in zip(layers.gate_up, layers.down, strict=True)
    ]
    return [lambda i=i, call=call: described[i % layers.copies](*call) for i, call in enumerate(inputs)]


def _ceiling(layers, distinct, sink, shape, itemsize, split):
    """Reads as many bytes as the call's distinct experts have, from the copy that the call uses.

    split: two kernels of the sizes that gate_up and down have (2/3 and 1/3), the honest ceiling of a small call.
    """
    reads = []
    for i, experts in enumerate(distinct):
        copy = i % layers.copies
        first = (7 * i) % (shape.experts - experts + 1)  # not always the same experts, as routings do
        gate_up, down = layers.gate_up[copy][first : first + experts], layers.down[copy][first : first + experts]
        if split:
            pair = (read_memory(gate_up, sink), read_memory(down, sink))
            reads.append(lambda pair=pair: [read() for read in pair])
        else:
            # one contiguous read of all the bytes; where gate_up alone is too short for that, the two parts after all
            words = experts * shape.bytes_per_expert(itemsize) // itemsize
            flat = layers.gate_up[copy].view(-1)
            if words <= flat.numel():
                start = min(first * 2 * shape.intermediate * shape.hidden, flat.numel() - words)
                reads.append(read_memory(flat[start : start + words], sink))
            else:
                pair = (read_memory(gate_up, sink), read_memory(down, sink))
                reads.append(lambda pair=pair: [read() for read in pair])
    return reads
