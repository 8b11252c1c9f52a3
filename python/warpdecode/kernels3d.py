"""The two kernels on their own, for those who want the intermediate: to look at it, or to run one half elsewhere."""

from __future__ import annotations

from warpdecode import threads
from warpdecode._ffi import check, ffi, lib, new_struct
from warpdecode.frameworks import adapter_of
from warpdecode.ops import Experts
from warpdecode.slots import Slot


def _run(function, experts: Experts, like, inputs: dict, shape, out):
    adapter = adapter_of(like, next(iter(inputs)))
    adapter.guard(inputs, experts._weights)
    slots = []
    for name, array in inputs.items():
        slots.append(Slot(name))
        adapter_of(array, name).bind(slots[-1], array)
    described = experts._current()
    output, out_adapter = Slot("out"), None
    if out is None:
        made = adapter.empty(shape, like)
        adapter.bind_output(output, made)
    else:
        out_adapter = adapter_of(out, "out")
        out_adapter.bind(output, out, True)
    tokens, top_k = inputs["topk_ids"].shape
    size = ffi.new("size_t *")
    check(lib.wd_moe_workspace_size(described.struct, tokens, top_k, size))
    address, owner = adapter.workspace(size[0], like)
    options = new_struct("wd_options")
    options.kernel = experts._kernel
    pool = None
    if described.on_cpu:
        pool = options.threads = threads.pool()  # under a name: see Experts.__call__
    check(
        function(
            described.struct,
            *(slot.tensor for slot in slots),
            output.tensor,
            ffi.cast("void *", address),
            size[0],
            ffi.cast("void *", adapter.stream(like)),
            options,
        )
    )
    if out_adapter is None:
        out = adapter.finish(made, like)
    else:
        out_adapter.wrote(out)
    del owner, pool  # alive until here
    return out


def moe_gate_up_3d_batched(experts: Experts, hidden_states, topk_ids, *, out=None):
    """The first kernel: activation(gate) * up of every route, [T, K, P, I] in the dtype of hidden_states.

    P is 2 for bfloat16 and float16: the rounded value and the rounding's remainder; the value is
    `r[:, :, 0] + r[:, :, 1] * scale` with scale 1 for bfloat16 and 2**-11 for float16. P is 1 for float32.
    Rows of routes whose id is outside [0, E) are not written. Experts with weight_on_input are refused by both kernels:
    this one takes no routing weights, and the other would have to ignore those that it takes.
    """
    parts = 1 if "float32" in str(hidden_states.dtype) else 2
    tokens, top_k = topk_ids.shape
    shape = (tokens, top_k, parts, experts._current().intermediate)
    inputs = {"hidden_states": hidden_states, "topk_ids": topk_ids}
    return _run(lib.wd_moe_gate_up_3d_batched, experts, hidden_states, inputs, shape, out)


def moe_down_3d_batched(experts: Experts, intermediate, topk_ids, topk_weights, *, out=None):
    """The second kernel: sum over slots of topk_weights * down_proj . intermediate, [T, H].

    Behind `moe_gate_up_3d_batched` it gives the bits of a call of `experts`.
    """
    shape = (intermediate.shape[0], experts._current().hidden)
    inputs = {"intermediate": intermediate, "topk_ids": topk_ids, "topk_weights": topk_weights}
    return _run(lib.wd_moe_down_3d_batched, experts, intermediate, inputs, shape, out)
