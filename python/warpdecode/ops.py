"""The operations: `moe`, the two kernels, and `Experts`, which keeps a layer's description between calls."""

from __future__ import annotations

from warpdecode import threads
from warpdecode._ffi import OK, check, ffi, lib, new_struct
from warpdecode.frameworks import adapter_of
from warpdecode.slots import Slot

ACTIVATIONS = {"silu": lib.WD_ACTIVATION_SILU, "gelu_tanh": lib.WD_ACTIVATION_GELU_TANH}

_forward = lib.wd_moe_forward
_cast, _VOID = ffi.cast, ffi.typeof("void *")
_workspace_size = lib.wd_moe_workspace_size

# A CPU call has ended when it returns, so its workspace can serve the next one; up to this size a frame keeps it. On
# CUDA the framework's allocator makes one for each call: it knows streams and graph capture.
_KEPT_WORKSPACE_BYTES = 1 << 20


class _Frame:
    """What one running call needs of its own. Frames are taken and given back, so that threads can share an Experts."""

    __slots__ = ("call_key", "hidden", "ids", "options", "output", "size", "weights", "workspace", "workspace_bytes")

    def __init__(self):
        self.hidden, self.ids = Slot("hidden_states"), Slot("topk_ids")
        self.weights, self.output = Slot("topk_weights"), Slot("out")
        self.size = ffi.new("size_t *")
        self.workspace_bytes, self.call_key = 0, None
        self.workspace = None  # (address, owner), kept for the next call of this shape
        self.options = new_struct("wd_options")

    def borrows(self) -> bool:
        """Whether a slot holds a capsule: such a frame is not kept, or it would keep the caller's arrays alive."""
        return not (self.hidden.keep is self.ids.keep is self.weights.keep is self.output.keep is None)


class Experts:
    """One MoE layer's experts, described once and called many times.

    Args:
        gate_up_proj: [E, 2I, H], rows gate(0..I-1) then up(0..I-1); bfloat16 or float16, on the CPU also float32.
        down_proj: [E, H, I], same dtype and device.
        activation: "silu" or "gelu_tanh", applied to gate.
        kernel: the name of a row of `warpdecode.kernels()` to use instead of the one that would be chosen; for tests
            and benchmarks, since all of a device's kernels give the same bits.

    The weights are neither copied nor repacked: changing them in place is seen by the next call. The object keeps
    the arrays alive, and looks before each call whether a torch parameter was given other memory (`.data = ...`).
    It may be called from several threads. H and I are multiples of 8; arrays are contiguous.

    The result of a call, for token t (the layer of https://arxiv.org/abs/2401.04088, section 2.1):
        e = topk_ids[t,k]
        out[t] = sum_k topk_weights[t,k] * down_proj[e] @ (activation(gate[e] @ x[t]) * (up[e] @ x[t]))
    """

    def __init__(self, gate_up_proj, down_proj, *, activation: str = "silu", kernel: str | None = None):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: was {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
        self.gate_up_proj, self.down_proj, self.activation = gate_up_proj, down_proj, activation
        self._kernel = ffi.NULL if kernel is None else ffi.new("char[]", kernel.encode())
        self._adapter = adapter_of(gate_up_proj, "gate_up_proj")
        self._description = _Description(gate_up_proj, down_proj, activation)
        self._frames: list[_Frame] = []

    def matches(self, gate_up_proj, down_proj) -> bool:
        """Whether these torch tensors are what this object describes: same memory, shapes and dtypes."""
        described = self._description
        return (
            gate_up_proj.data_ptr() == described.gate_up.address
            and down_proj.data_ptr() == described.down.address
            and gate_up_proj.shape == described.gate_up.shape
            and down_proj.shape == described.down.shape
            and gate_up_proj.dtype is described.gate_up.dtype
            and down_proj.dtype is described.down.dtype
        )

    def _current(self) -> _Description:
        described, moved = self._description, self._adapter.moved
        if moved(described.gate_up, self.gate_up_proj) or moved(described.down, self.down_proj):
            described = self._description = _Description(self.gate_up_proj, self.down_proj, self.activation)
            self._frames = []  # their workspace sizes are of the old shape
        return described

    def _take_frame(self) -> _Frame:
        try:
            return self._frames.pop()
        except IndexError:
            frame = _Frame()
            frame.options.kernel = self._kernel
            return frame

    def _workspace_bytes(self, frame: _Frame, described: _Description) -> int:
        shape = frame.ids.tensor.shape
        key = (shape[0], shape[1]) if frame.ids.tensor.ndim == 2 else (0, 1)
        if key != frame.call_key:
            check(_workspace_size(described.struct, *key, frame.size))
            frame.call_key, frame.workspace_bytes, frame.workspace = key, frame.size[0], None
        return frame.workspace_bytes

    def __call__(self, hidden_states, topk_ids, topk_weights, *, out=None):
        """The layer's output for a batch of tokens.

        Args:
            hidden_states: [T, H], dtype and device of the weights. T may be 0.
            topk_ids: [T, K], int32 or int64. Ids outside [0, E) contribute nothing.
            topk_weights: [T, K], float32, bfloat16 or float16.
            out: an array [T, H] to write to; it must not overlap an input. None: a fresh one of the caller's framework.

        Returns `out`. On CUDA the work is enqueued on the current stream of hidden_states' framework.
        Raises ValueError for bad arguments, naming the argument; RuntimeError where CUDA fails or is missing.
        """
        adapter = adapter_of(hidden_states, "hidden_states")
        adapter.guard(
            hidden_states=hidden_states,
            topk_weights=topk_weights,
            gate_up_proj=self.gate_up_proj,
            down_proj=self.down_proj,
        )
        described = self._current()
        frame = self._take_frame()
        adapter.bind(frame.hidden, hidden_states)
        adapter_of(topk_ids, "topk_ids").bind(frame.ids, topk_ids)
        adapter_of(topk_weights, "topk_weights").bind(frame.weights, topk_weights)
        made = None
        if out is None:
            made = adapter.empty_like(hidden_states)
            adapter.bind_output(frame.output, made)
        else:
            adapter_of(out, "out").bind(frame.output, out, True)
        size = self._workspace_bytes(frame, described)
        pool = None
        workspace = frame.workspace or adapter.workspace(size, hidden_states)
        if described.on_cpu:
            # under a name, so that set_num_threads in another thread cannot end the pool during the call
            pool = frame.options.threads = threads.pool()
            if size <= _KEPT_WORKSPACE_BYTES:
                frame.workspace = workspace
        status = _forward(
            described.struct,
            frame.hidden.tensor,
            frame.ids.tensor,
            frame.weights.tensor,
            frame.output.tensor,
            _cast(_VOID, workspace[0]),
            size,
            _cast(_VOID, adapter.stream(hidden_states)),
            frame.options,
        )
        if status != OK:
            check(status)
        if not frame.borrows():
            self._frames.append(frame)
        del pool
        return out if made is None else adapter.finish(made)


class _Description:
    """The C struct of a layer and what it points to. Never changed once made: running calls may be reading it."""

    __slots__ = ("down", "gate_up", "on_cpu", "struct")

    def __init__(self, gate_up_proj, down_proj, activation: str):
        self.gate_up, self.down = Slot("gate_up_proj"), Slot("down_proj")
        adapter_of(gate_up_proj, "gate_up_proj").bind(self.gate_up, gate_up_proj)
        adapter_of(down_proj, "down_proj").bind(self.down, down_proj)
        self.struct = new_struct("wd_moe_experts")
        self.struct.gate_up_proj, self.struct.down_proj = self.gate_up.tensor, self.down.tensor
        self.struct.activation = ACTIVATIONS[activation]
        self.on_cpu = self.gate_up.tensor.device.device_type != lib.kDLCUDA
        check(_workspace_size(self.struct, 1, 1, ffi.new("size_t *")))  # bad weights are refused here, not in a call


def moe(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, *, activation: str = "silu", out=None):
    """One MoE layer's experts on a batch of tokens; the arguments are those of `Experts` and of its call.

    `Experts` keeps the layer's description between calls and saves about 10 us a call.
    """
    return Experts(gate_up_proj, down_proj, activation=activation)(hidden_states, topk_ids, topk_weights, out=out)
