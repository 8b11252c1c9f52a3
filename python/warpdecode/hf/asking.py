"""Whether a module that looks like one of transformers' experts interface asks it for an implementation at all: the
forward of a subclass, of the instance, or of a transformers that keeps the name elsewhere may not. It is called once,
without tokens."""

import threading

import torch

from .config import PatchedConfig, own_implementation
from .registries import FORWARD, as_written, implementation

_NAME = "warp_decode_asked"


_UNASKED = "its forward does not ask transformers' experts interface for the implementation that its config names"


class _Answered(Exception):
    """The call came to us."""


@torch.no_grad()
def unanswered(module: torch.nn.Module) -> str | None:
    """The reason why the module's forward would not call the implementation that its config names."""
    config = module.__dict__["config"]
    inner = config.inner if type(config) is PatchedConfig else config
    asker = threading.get_ident()

    def answer(self, *call, **named):
        if threading.get_ident() != asker:  # somebody runs the model meanwhile
            return implementation(own_implementation(self), as_written(type(self)))(self, *call, **named)
        raise _Answered

    state = module.__dict__
    forward = state.get("_old_forward", module.forward) if "_hf_hook" in state else module.forward
    first = next(module.parameters(), None)
    if first is None:
        return None  # it has no weights now, which is said elsewhere
    tokens, weights = (torch.empty(0, size, dtype=first.dtype, device="cpu") for size in (first.shape[-1], 1))
    FORWARD[_NAME] = answer
    state["config"] = PatchedConfig(inner, None, _NAME)
    try:
        forward(tokens, torch.empty(0, 1, dtype=torch.int64, device="cpu"), weights)
    except _Answered:
        return None
    except Exception as error:  # whatever a foreign forward raises
        return f"{_UNASKED} ({type(error).__name__}: {error})"
    finally:
        state["config"] = config
        FORWARD.pop(_NAME, None)
    return _UNASKED
