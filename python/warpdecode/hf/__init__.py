"""Hugging Face transformers, served by warpdecode's kernels.

    import warpdecode.hf

    model = warpdecode.hf.patch(AutoModelForCausalLM.from_pretrained(...))      # a model in hand
    with warpdecode.hf.patched(model): ...                                      # a scope
    warpdecode.hf.register()                                                    # or by name:
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="warp_decode")
    print(warpdecode.hf.explain(model))                                         # which layer takes which path, and why

What the kernels cannot serve (a call that needs gradients above all) goes to the model's own path. That is said once
per reason and model by a `WarpDecodeFallbackWarning`, and raises `WarpDecodeFallbackError` under `patch(strict=True)`.

A call needs gradients when grad mode is on *and* its inputs or the layer's weights require grad; `model.train()` and
`model.eval()` play no part. A rollout under `torch.no_grad()` (`generate()` always is) therefore gets the kernels' bits
whatever mode the model is in, and a training step gets the model's own path, whose bits differ. Where both must agree,
score under `torch.no_grad()` too, or limit the kernels to a scope with `patched`. Reentrant gradient checkpointing runs
its first forward under `no_grad` and so takes the kernels there, and the model's own path when it recomputes.
"""

try:
    import torch  # noqa: F401
    from transformers.integrations.moe import ExpertsInterface  # noqa: F401
except ImportError as error:
    raise ImportError(
        "warpdecode.hf needs torch, and a transformers 5 that has the experts interface "
        f"(transformers.integrations.moe); importing them failed: {error}"
    ) from error

from .config import WarpDecodeFallbackError, WarpDecodeFallbackWarning
from .explain import Explanation, LayerRow, explain
from .forward import register
from .patch import patch, patched, unpatch

__all__ = [
    "Explanation",
    "LayerRow",
    "WarpDecodeFallbackError",
    "WarpDecodeFallbackWarning",
    "explain",
    "patch",
    "patched",
    "register",
    "unpatch",
]
