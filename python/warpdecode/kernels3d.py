"""The two kernels on their own, for those who want the intermediate: to look at it, or to run one half elsewhere."""

from __future__ import annotations

from warpdecode import threads
from warpdecode._ffi import WORDS, check, ffi, lib, new_struct
from warpdecode.frameworks import adapter_of
from warpdecode.ops import Experts
from warpdecode.slots import Slot


def _run(function, experts: Experts, inputs: dict, shape_of, out, words=WORDS):
    if not isinstance(experts, Experts):
        raise ValueError(f"experts: was a {type(experts).__qualname__}, expected a warpdecode.Experts")
    first, like = next(iter(inputs.items()))
    adapter = adapter_of(like, first)
    adapter.guard(inputs, experts._weights)
    slots = {name: Slot(name) for name in inputs}
    for name, array in inputs.items():
        adapter_of(array, name).bind(slots[name], array)
    described, ids = experts._current(), slots["topk_ids"].tensor
    if ids.ndim != 2:
        raise ValueError(f"topk_ids: had {ids.ndim} axes, expected 2: [T, K]")
    tokens, top_k = ids.shape[0], ids.shape[1]
    output, out_adapter = Slot("out"), None
    if out is None:
        made = adapter.empty(shape_of(tokens, top_k, described, slots[first].tensor), like)
        adapter.bind_output(output, made)
    else:
        out_adapter = adapter_of(out, "out")
        out_adapter.bind(output, out, True)
        described.check_apart(output)
    size = ffi.new("size_t *")
    check(lib.wd_moe_workspace_size(described.struct, tokens, top_k, size))
    address, owner = adapter.workspace(size[0], like)
    options = new_struct("wd_options")
    options.kernel = experts._kernel
    pool = None
    if described.on_cpu:
        pool = options.threads = threads.pool()  # under a name: see Experts.__call__
    status = function(
        described.struct,
        *(slot.tensor for slot in slots.values()),
        output.tensor,
        ffi.cast("void *", address),
        size[0],
        ffi.cast("void *", adapter.stream(like)),
        options,
    )
    check(status, words)
    if out_adapter is None:
        out = adapter.finish(made, like)
    else:
        out_adapter.wrote(out)
    del owner, pool  # alive until here
    return out


def moe_gate_up_3d_batched(experts: Experts, hidden_states, topk_ids, *, out=None):
    """The first kernel: activation(gate) * up of every route.

    Args:
        experts: the layer. Experts with weight_on_input are refused by both kernels: this one takes no routing weights,
            and the other would have to ignore those that it takes.
        hidden_states: [T, H], dtype and device of the weights. T may be 0.
        topk_ids: [T, K], int32 or int64.
        out: an array [T, K, P, I] in the dtype of hidden_states. None: a fresh one of the caller's framework.

    Returns `out`. P is 2 for bfloat16 and float16: the rounded value and the rounding's remainder; the value is
    `r[:, :, 0] + r[:, :, 1] * scale` with scale 1 for bfloat16 and 2**-11 for float16. P is 1 for float32. Rows of
    routes whose id is outside [0, E) are not written.
    Raises ValueError for bad arguments, naming the argument; RuntimeError where CUDA fails or is missing.
    """

    def shape(tokens, top_k, described, hidden):
        return tokens, top_k, 1 if hidden.dtype.bits == 32 else 2, described.intermediate

    inputs = {"hidden_states": hidden_states, "topk_ids": topk_ids}
    # What is the output here is an input of the other kernel, and has that name in the library's sentences.
    words = {**WORDS, "intermediate: ": "out: "}
    return _run(lib.wd_moe_gate_up_3d_batched, experts, inputs, shape, out, words)


def moe_down_3d_batched(experts: Experts, intermediate, topk_ids, topk_weights, *, out=None):
    """The second kernel: sum over slots of topk_weights * down_proj . intermediate.

    Args:
        experts: the layer, without weight_on_input.
        intermediate: [T, K, P, I], as `moe_gate_up_3d_batched` gives it; dtype and device of the weights.
        topk_ids: [T, K], int32 or int64. Ids outside [0, E) contribute nothing.
        topk_weights: [T, K], float32, bfloat16 or float16.
        out: an array [T, H] to write to. None: a fresh one of the caller's framework.

    Returns `out`. Behind `moe_gate_up_3d_batched` it has the bits of a call of `experts`.
    Raises ValueError for bad arguments, naming the argument; RuntimeError where CUDA fails or is missing.
    """

    def shape(tokens, top_k, described, intermediate):
        return tokens, described.hidden

    inputs = {"intermediate": intermediate, "topk_ids": topk_ids, "topk_weights": topk_weights}
    return _run(lib.wd_moe_down_3d_batched, experts, inputs, shape, out)
