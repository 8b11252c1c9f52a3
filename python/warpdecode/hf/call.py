"""What one call brings that the kernels cannot serve. Asked on every call, so each question costs some 0.1 us."""

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules import module

# Hooks that torch calls around every module of the process.
GLOBAL_HOOKS = (module._global_forward_hooks, module._global_forward_pre_hooks)

PLAIN = frozenset({torch.Tensor, Parameter})

_ID_DTYPES = frozenset({torch.int32, torch.int64})
_WEIGHT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_functorch_interpreter = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def watched() -> str | None:
    """The reason when somebody records or transforms the operations of this call: they would not see the kernels'.

    Asked before anything else, because even looking at tensors would be recorded. torch.compile is not among them: it
    traces the asking, too, and is asked for by `torch.compiler.is_compiling()`."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing the model, and the kernels cannot be traced"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active (FakeTensorMode, a FLOP counter, ...) and would not see the kernels"
    if _functorch_interpreter() is not None or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active, and the kernels have no derivative"
    return None


def call_against(names, parameters, inputs) -> str | None:
    """The reason why the kernels cannot serve this call of a layer that they can serve; None when they can.
    `parameters` are its weights as they are now, by `names`; `inputs` the hidden states, the ids and the routing
    weights. torch.compile traces it, too."""
    first = parameters[0]
    hidden_states, ids, weights = inputs
    if not (type(hidden_states) in PLAIN and type(ids) in PLAIN and type(weights) in PLAIN):
        kinds = sorted({type(t).__name__ for t in (hidden_states, ids, weights) if type(t) not in PLAIN})
        return f"the call brings tensors of class {', '.join(kinds)}, not plain torch.Tensor"
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad or weights.requires_grad or _any_requires_grad(parameters)
    ):
        return _gradients((*names, "hidden_states", "top_k_weights"), (*parameters, hidden_states, weights))
    if hidden_states.dtype is not first.dtype or hidden_states.device != first.device:
        return _unlike(hidden_states, first)
    if ids.dtype not in _ID_DTYPES or weights.dtype not in _WEIGHT_DTYPES:
        return (
            f"top_k_index is {ids.dtype} and top_k_weights {weights.dtype}, not int32 or int64 and float32, bfloat16 "
            "or float16"
        )
    if hidden_states.dim() != 2 or ids.dim() != 2 or ids.shape != weights.shape:
        return _shapes_against(hidden_states, ids, weights)
    device_type = first.device.type
    return _autocast_against(first.dtype, device_type) if torch.is_autocast_enabled(device_type) else None


def block_call_against(block, names, parameters, hidden_states) -> str | None:
    """The same of a block that makes its ids and routing weights itself, asked before it does: its other parameters,
    the router's among them, stand for the routing weights."""
    first = parameters[0]
    if type(hidden_states) not in PLAIN:
        return f"the call brings tensors of class {type(hidden_states).__name__}, not plain torch.Tensor"
    if torch.is_grad_enabled():
        others = dict(block.named_parameters())
        named = (*names, "hidden_states", *others), (*parameters, hidden_states, *others.values())
        if _any_requires_grad(named[1]):
            return _gradients(*named)
    if hidden_states.dtype is not first.dtype or hidden_states.device != first.device:
        return _unlike(hidden_states, first)
    device_type = first.device.type
    return _autocast_against(first.dtype, device_type) if torch.is_autocast_enabled(device_type) else None


def _gradients(names, tensors) -> str:
    first = next(name for name, tensor in zip(names, tensors, strict=True) if tensor.requires_grad)
    return (
        f"gradients are needed (grad mode is on and {first} requires grad) and the kernels have no backward; use "
        "torch.no_grad() or model.requires_grad_(False) where none are"
    )


def _unlike(hidden_states, first) -> str:
    return (
        f"hidden_states is {hidden_states.dtype} on {hidden_states.device} and the weights {first.dtype} on "
        f"{first.device}; they must be the same"
    )


def _shapes_against(hidden_states, ids, weights) -> str:
    if hidden_states.dim() != 2 or ids.dim() != 2:
        return f"hidden_states has {hidden_states.dim()} dimensions and top_k_index {ids.dim()}, not 2 and 2"
    shapes = f"{tuple(ids.shape)} and top_k_weights {tuple(weights.shape)}"
    return f"top_k_index is {shapes}: not a weight for every id, and the kernels take no other"


def _any_requires_grad(parameters) -> bool:
    return any([parameter.requires_grad for parameter in parameters])  # a list: a generator costs twice as much


def _autocast_against(dtype, device_type) -> str | None:
    to = torch.get_autocast_dtype(device_type)
    return None if to is dtype else f"autocast to {to} is on and the weights are {dtype}"
