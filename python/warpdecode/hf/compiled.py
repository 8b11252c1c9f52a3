"""The kernels under torch.compile: one opaque operator, chosen while the model is traced.

torch.compile can trace neither DLPack nor raw pointers, so a compiled graph holds `torch.ops.warpdecode.experts`. It
takes tensors and a string alone, the same for all layers of a model, so that a compiled layer serves the others, too.
Outside of compilation a layer is called directly: the dispatcher would cost more than it brings.
"""

import ctypes

import torch

from .call import block_call_against, call_against
from .config import WarpDecodeFallbackError, policies
from .forms import INTERFACE
from .found import form_of
from .layer import experts_of, kinds_of, look_at, weights_against
from .state import FORM, SLOT, holds_traced

EXPORTING = "torch.export is tracing the model, and an exported program must run without warpdecode"

_library = torch.library.Library("warpdecode", "DEF")
_library.define(
    "experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor[] weights, str description) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(hidden_states, topk_ids, topk_weights, weights, description):
    experts = experts_of(weights, description)
    inputs = (hidden_states, topk_ids, topk_weights)
    return experts(*(t if t.is_contiguous() else t.contiguous() for t in inputs))


def _run_fake(hidden_states, topk_ids, topk_weights, weights, description):
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_library.impl("experts", _run, "CPU")
_library.impl("experts", _run, "CUDA")
torch.library.register_fake("warpdecode::experts", _run_fake, lib=_library)


def serve(module, inputs, caller) -> torch.Tensor:
    """What `forward.serve` does, in steps that torch.compile can trace."""
    reason, run = prepared(module, inputs)
    if reason is not None:
        say(caller.key(module), type(module).__name__, caller.own_name(module), reason)
        return caller.own_path(module)(module, *inputs)
    return run(*inputs)


def prepared(module, inputs):
    """What `forward.prepared` does, likewise."""
    # Not is_exporting(): torch.compile of torch 2.11 and before takes it for True in every compilation. The flag behind
    # it is what torch.export sets.
    if torch.compiler._is_exporting_flag:
        return EXPORTING, None
    form = getattr(type(module), FORM, INTERFACE)
    names = form.names(module)
    weights, _ = form.weights(module, names)
    reason = weights_against(names, weights)
    if reason is None:
        reason, description = _known(module, weights)
    if reason is None and len(inputs) == 1:
        reason = block_call_against(module, names, weights, *inputs)
    elif reason is None:
        reason = call_against(names, weights, inputs)
    if reason is not None:
        return reason, None
    return None, lambda *call: torch.ops.warpdecode.experts.default(*call, weights, description)


def _known(module, weights) -> tuple[str | None, str]:
    """(reason why the module is not served with such weights, its description)."""
    layer = module.__dict__.get(SLOT)
    described = layer is not None and layer.gate is not None and layer.kinds == kinds_of(weights)
    if described and holds_traced(layer.state, module):
        return layer.reason, layer.description
    reason, description, state = _look_at(id(module))
    holds_traced(state, module, compare=False)  # for the guards
    return reason, description


# Both run while tracing and leave nothing in the graph. What they return is part of the compiled code.
@torch.compiler.assume_constant_result
def _look_at(address: int) -> tuple[str | None, str, tuple]:
    """For a module of which nothing is known, or with other weights. It ties the compiled code to this one module, so
    that a compiled layer would be compiled again for each of the model's: hence what is known is used where it can.

    By its id(), which is its address, because torch 2.11 takes only constants here. The caller keeps it alive."""
    module = ctypes.cast(address, ctypes.py_object).value
    layer, _ = look_at(module, form_of(module))
    return layer.reason, layer.description, layer.state


@torch.compiler.assume_constant_result
def _report(key: str, class_name: str, own_path: str, reason: str) -> str | None:
    try:
        policies[key].report(class_name, own_path, reason)
    except WarpDecodeFallbackError as error:
        return str(error)
    return None


def say(key: str, class_name: str, own_path: str, reason: str) -> None:
    """Says, or raises, by the policy of this key. Raised in code that is traced: torch.compile then leaves the frame to
    Python, which raises it again, and with fullgraph=True says that it could not trace it, with our sentence."""
    error = _report(key, class_name, own_path, reason)
    if error is not None:
        raise WarpDecodeFallbackError(error)
