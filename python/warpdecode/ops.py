"""The operations: `moe`, the two kernels, and `Experts`, which keeps a layer's description between calls."""

from __future__ import annotations

from warpdecode import threads
from warpdecode._ffi import OK, check, ffi, lib, new_struct
from warpdecode.build_info import kernels
from warpdecode.description import Description, struct_fields
from warpdecode.frameworks import adapter_of
from warpdecode.slots import Slot

_forward = lib.wd_moe_forward
_cast, _VOID, _NO_STREAM = ffi.cast, ffi.typeof("void *"), ffi.NULL
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
        self.workspace = None  # (void *, owner), kept for the next call of this shape
        self.options = new_struct("wd_options")

    def borrows(self) -> bool:
        """Whether a slot holds a capsule: such a frame is not kept, or it would keep the caller's arrays alive."""
        return not (self.hidden.keep is self.ids.keep is self.weights.keep is self.output.keep is None)


class Experts:
    """One MoE layer's experts, described once and called many times.

    Args:
        gate_up_proj: [E, 2I, H], rows gate(0..I-1) then up(0..I-1); bfloat16 or float16, on the CPU also float32.
        down_proj: [E, H, I], same dtype and device.
        activation: applied to gate: "silu", "gelu_tanh", "gelu" (of erf), "relu" or "relu2" (its square).
        is_transposed: True: gate_up_proj is [E, H, 2I] and down_proj [E, I, H]; "down": down_proj alone is.
        is_interleaved: the rows of gate_up_proj (its columns, where transposed) are gate(0), up(0), gate(1), ...
        up_proj: the up rows [E, I, H]; gate_up_proj then has the gate rows alone, [E, I, H].
        has_gate: False: gate_up_proj is [E, I, H], and the intermediate is activation(gate_up_proj[e] @ x).
        gate_up_bias: [E, 2I], in the order of gate_up_proj's rows ([E, I] where those are I); dtype of the weights or
            float32, as the other biases.
        up_bias: [E, I], with up_proj.
        down_bias: [E, H], added before the routing weight is multiplied.
        alpha: of silu: g * sigmoid(alpha * g). None: 1.
        limit: gate = min(gate, limit) and up = clamp(up, -limit, limit). None: none.
        clamp_after_activation: the limit holds for activation(gate) instead of gate.
        up_offset: added to up, after the limit. gpt-oss is alpha=1.702, limit=7.0, up_offset=1.0.
        weight_on_input: topk_weights multiply the hidden states instead of the output; the call alone, and neither of
            the two kernels, serves it.
        kernel: the name of a row of `warpdecode.kernels()` to use instead of the one that would be chosen; for tests
            and benchmarks, since all of a device's kernels give the same bits.

    Any of the arrays may be a list of E arrays without the axis E (the weights of one Linear an expert): all of one
    shape, dtype and device. The same numbers give the same bits in every layout; on CUDA many tokens take longer with
    transposed weights and with lists, on the CPU transposed weights take longer.

    The weights are neither copied nor repacked: changing them in place is seen by the next call. The object keeps
    the arrays alive, and looks before each call whether a torch parameter was given other memory (`.data = ...`) or
    another shape. It cannot know of a new parameter in the old one's place, as `module.weight = ...` and
    `load_state_dict(assign=True)` make it, nor of strides or a dtype that changed alone (`transpose_()`,
    `.data = data.view(dtype)`): describe anew. What it describes cannot be assigned. It may be called from several
    threads, copied and pickled, which copies its arrays. H and I are multiples of 8; arrays are contiguous.

    Raises ValueError for bad arguments, naming the argument.

    The result of a call, for token t (the layer of https://arxiv.org/abs/2401.04088, section 2.1):
        e = topk_ids[t,k]
        out[t] = sum_k topk_weights[t,k] * down_proj[e] @ (activation(gate[e] @ x[t]) * (up[e] @ x[t]))
    """

    def __init__(
        self,
        gate_up_proj,
        down_proj,
        *,
        activation: str = "silu",
        is_transposed: bool | str = False,
        is_interleaved: bool = False,
        up_proj=None,
        has_gate: bool = True,
        gate_up_bias=None,
        up_bias=None,
        down_bias=None,
        alpha: float | None = None,
        limit: float | None = None,
        clamp_after_activation: bool = False,
        up_offset: float = 0.0,
        weight_on_input: bool = False,
        kernel: str | None = None,
    ):
        keywords = {
            "activation": activation,
            "is_transposed": is_transposed,
            "is_interleaved": is_interleaved,
            "has_gate": has_gate,
            "alpha": alpha,
            "limit": limit,
            "clamp_after_activation": clamp_after_activation,
            "up_offset": up_offset,
            "weight_on_input": weight_on_input,
        }
        self._properties = struct_fields(**keywords)
        self._keywords = {**keywords, "kernel": kernel}  # for copies
        if kernel is not None and kernel not in (names := [row.name for row in kernels()]):
            raise ValueError(f"kernel: was {kernel!r}, expected None or one of {', '.join(names)}")
        arrays = {
            "gate_up_proj": gate_up_proj,
            "down_proj": down_proj,
            "up_proj": up_proj,
            "gate_up_bias": gate_up_bias,
            "up_bias": up_bias,
            "down_bias": down_bias,
        }
        self._arrays = {
            name: tuple(array) if isinstance(array, (list, tuple)) else array
            for name, array in arrays.items()
            if array is not None or name in ("gate_up_proj", "down_proj")
        }
        self._kernel = ffi.NULL if kernel is None else ffi.new("char[]", kernel.encode())
        self._description = Description(self._arrays, self._properties)
        self._weights = self._description.members  # for the adapter's guard
        self._frames: list[_Frame] = []

    def __reduce__(self):
        return _described, (type(self), self._arrays, self._keywords)

    @property
    def gate_up_proj(self):
        """The array that was described, or the tuple of arrays."""
        return self._arrays["gate_up_proj"]

    @property
    def down_proj(self):
        """The array that was described, or the tuple of arrays."""
        return self._arrays["down_proj"]

    @property
    def activation(self) -> str:
        """The activation's name."""
        return self._keywords["activation"]

    def matches(self, gate_up_proj, down_proj, **others) -> bool:
        """Whether these torch tensors (or lists of them) are what this object describes: same memory, shapes, dtypes.

        others: up_proj and the biases, by their names; None for one that there is not.
        """
        parts = self._description.parts
        if not (parts["gate_up_proj"].is_of(gate_up_proj) and parts["down_proj"].is_of(down_proj)):
            return False
        given = {name: array for name, array in others.items() if array is not None}
        return len(given) + 2 == len(parts) and all(
            name in parts and parts[name].is_of(array) for name, array in given.items()
        )

    def _current(self) -> Description:
        described = self._description
        if not described.holds():
            described = self._description = Description(self._arrays, self._properties)
            self._frames = []  # their workspace sizes are of the old shape
        return described

    def _take_frame(self) -> _Frame:
        try:
            return self._frames.pop()
        except IndexError:
            frame = _Frame()
            frame.options.kernel = self._kernel
            return frame

    def _workspace_bytes(self, frame: _Frame, described: Description) -> int:
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
        Raises ValueError for bad arguments, naming the argument; RuntimeError where CUDA fails or is missing. Bad are
        tensors that require a gradient in torch's grad mode or carry a tangent, and calls under torch.jit.trace,
        make_fx, torch.vmap, jax.jit and the like; torch.compile breaks its graph around the call.
        """
        adapter = adapter_of(hidden_states, "hidden_states")
        adapter.guard({"hidden_states": hidden_states, "topk_weights": topk_weights}, self._weights)
        described = self._current()
        frame = self._take_frame()
        adapter.bind(frame.hidden, hidden_states)
        adapter_of(topk_ids, "topk_ids").bind(frame.ids, topk_ids)
        adapter_of(topk_weights, "topk_weights").bind(frame.weights, topk_weights)
        if out is None:
            out_adapter, made = None, adapter.empty_like(hidden_states)
            adapter.bind_output(frame.output, made)
        else:
            out_adapter = adapter_of(out, "out")
            out_adapter.bind(frame.output, out, True)
            described.check_apart(frame.output)
        size = self._workspace_bytes(frame, described)
        workspace = frame.workspace
        if workspace is None:
            address, owner = adapter.workspace(size, hidden_states)
            workspace = _cast(_VOID, address), owner
        pool = None
        if described.on_cpu:
            stream = _NO_STREAM
            # under a name, so that set_num_threads in another thread cannot end the pool during the call
            pool = frame.options.threads = threads.pool()
            if size <= _KEPT_WORKSPACE_BYTES:
                frame.workspace = workspace
        else:
            stream = _cast(_VOID, adapter.stream(hidden_states))
        status = _forward(
            described.struct,
            frame.hidden.tensor,
            frame.ids.tensor,
            frame.weights.tensor,
            frame.output.tensor,
            workspace[0],
            size,
            stream,
            frame.options,
        )
        if status != OK:
            check(status)
        if not frame.borrows():
            self._frames.append(frame)
        del pool
        if out_adapter is None:
            return adapter.finish(made, hidden_states)
        out_adapter.wrote(out)
        return out


def _described(kind: type[Experts], arrays: dict, keywords: dict) -> Experts:
    return kind(**arrays, **keywords)


def moe(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, *, out=None, **properties):
    """One MoE layer's experts on a batch of tokens: `Experts(gate_up_proj, down_proj, **properties)`, called once.

    Args:
        hidden_states: [T, H], dtype and device of the weights: bfloat16, float16, on the CPU also float32. T may be 0.
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) contribute nothing.
        topk_weights: [T, K], float32, bfloat16 or float16.
        gate_up_proj: [E, 2I, H], rows gate(0..I-1) then up(0..I-1).
        down_proj: [E, H, I].
        out: an array [T, H] to write to; it must not overlap an input. None: a fresh one of the caller's framework.
        properties: the keywords of `Experts` (activation, is_transposed, biases, ...).

    Returns `out`. `Experts` keeps the layer's description between calls and saves tens of microseconds a call.
    Raises ValueError for bad arguments, naming the argument; RuntimeError where CUDA fails or is missing.
    """
    return Experts(gate_up_proj, down_proj, **properties)(hidden_states, topk_ids, topk_weights, out=out)
