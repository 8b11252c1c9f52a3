"""torch tensors: described by their own attributes, which is faster than a capsule and synchronises with nothing."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from warpdecode._ffi import lib

_NAMES = {getattr(torch, name): name for name in (
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool",
    "complex64", "complex128",
)}  # fmt: skip
_CPU, _CUDA = int(lib.kDLCPU), int(lib.kDLCUDA)  # torch.compile traces `bind`, and cannot hold `lib`
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_data_ptr = torch.Tensor.data_ptr
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent in CPU builds of torch
_is_tracing, _modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack  # on every call, the fastest ways to ask


def bind(slot, array, writable=False):
    """Describe a tensor; only its address changes when shape, dtype and device are those of the last one."""
    if writable and (array.requires_grad or forward_ad._current_level >= 0):
        _refuse_derivatives(slot.name, array)
    device = array.get_device()
    if (
        array.shape == slot.shape
        and array.dtype is slot.dtype
        and device == slot.device
        and array.is_contiguous()
        and not array.is_neg()
    ):
        try:
            slot.place[0] = array.data_ptr()
        except RuntimeError as error:
            raise _without_memory(slot, error) from None
        return
    slot.shape = None  # until the description below is whole
    kind = array.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{slot.name}: was on {array.device}, expected a cpu or cuda tensor")
    if array.layout is not torch.strided:
        raise ValueError(f"{slot.name}: layout was {array.layout}, expected torch.strided")
    if array.is_neg():  # its memory has the other sign
        raise ValueError(f"{slot.name}: was a negated view, expected a plain tensor; pass its resolve_neg()")
    strides = None if array.is_contiguous() else array.stride()
    name = _NAMES.get(array.dtype, str(array.dtype))
    try:
        address = array.data_ptr()
    except RuntimeError as error:
        raise _without_memory(slot, error) from None
    slot.describe(address, array.shape, strides, name, _CUDA if kind == "cuda" else _CPU, max(device, 0))
    if strides is None:
        slot.shape, slot.dtype, slot.device = array.shape, array.dtype, device


def _without_memory(slot, error):
    return ValueError(
        f"{slot.name}: has no memory of its own ({error}); expected a plain tensor, outside of torch.vmap and other "
        "transforms"
    )


def bind_table(slot, addresses, like):
    """A tensor of int64 beside the weights; the copy to the device has ended when this returns."""
    owner = torch.tensor(addresses, dtype=torch.int64, device=like.device)
    bind(slot, owner)
    return owner


def guard(inputs, weights):
    """Refuses a call whose result would have to carry a gradient or a tangent, since dropping it silently would train a
    wrong model; and one that is traced, since a trace sees the output's memory and nothing that fills it."""
    forward = forward_ad._current_level >= 0
    if forward or torch.is_grad_enabled():
        for name, array in (*inputs.items(), *weights.items()):
            if forward or getattr(array, "requires_grad", False):
                _refuse_derivatives(name, array)
    if _is_tracing() or (_modes() and torch._C._get_dispatch_mode(_PROXY) is not None):
        raise ValueError(
            f"{next(iter(inputs))}: came while torch.jit.trace or make_fx traces the call, and a trace cannot hold "
            "these kernels; call them outside of it"
        )


def _refuse_derivatives(name, array):
    if getattr(array, "requires_grad", False) and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires a gradient, which these kernels do not compute; call under torch.no_grad(), or "
            "pass a detached tensor"
        )
    if isinstance(array, torch.Tensor) and forward_ad.unpack_dual(array).tangent is not None:
        raise ValueError(
            f"{name}: has a tangent of forward-mode differentiation, which these kernels do not compute; pass the "
            "primal of torch.autograd.forward_ad.unpack_dual"
        )


def places(arrays):
    """Their addresses and shapes: `parameter.data = ...` keeps the object and changes these. Asked on every call, of
    hundreds of tensors where each expert has its own, so by the two fastest ways there are."""
    return list(map(_data_ptr, arrays)), [array.shape for array in arrays]


empty_like = torch.empty_like  # several times faster than torch.empty with a shape, a dtype and a device


def empty(shape, like):
    """A fresh, uninitialised tensor."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


bind_output = bind  # an output that `empty` made has nothing to refuse


wrote = torch.autograd.graph.increment_version  # as torch's own in-place operations do


def workspace(size, like):
    """From torch's caching allocator: in stream order, and from the graph's own pool while one is captured."""
    owner = torch.empty(size, dtype=torch.uint8, device=like.device)
    return owner.data_ptr(), owner


def stream(like):
    """torch's current stream on the tensor's device."""
    device = like.get_device()
    if device < 0:
        return 0
    return _raw_stream(device) if _raw_stream is not None else torch.cuda.current_stream(device).cuda_stream


def finish(output, like):
    """Nothing to do."""
    return output
