"""Hugging Face transformers, served by warpdecode's kernels. Three ways to switch them on:

    import warpdecode.hf

    warpdecode.hf.patch(model)              # a model in hand; undone by unpatch(model)
    with warpdecode.hf.patched(model): ...  # the same for a scope
    warpdecode.hf.register()                # by name
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="warp_decode")
    warpdecode.hf.accelerate_decode()       # the decode loop of every generate() in this process

    print(warpdecode.hf.explain(model))     # which layer takes which path, and why

* `patch` is for the model that you hold: prefill, decode and scoring run on the kernels, so that their bits agree.
  `strict=True` forbids the model's own path, which otherwise stays as it was configured. It alone serves classes
  outside transformers' experts interface: Llama 4, DBRX, LongCat, Step 3.7, and those of transformers 4.57: blocks with
  one module an expert, the experts of gpt-oss and Qwen3-VL-MoE. Such a module has a class of ours, of the same name,
  while it is patched; its router and its shared experts are torch's as before.
* By name is for code that passes options on to transformers (a trainer, a config file) and never shows you the model.
  The model's own path is then grouped_mm. transformers before 5.7 accepts no names but its own, and `register` says so.
* `accelerate_decode` is for code that you cannot or do not want to change: it takes the place of transformers'
  `batched_mm`, which `generate()` chooses for its decode loop on a GPU. Prefill stays on grouped_mm, so the bits of a
  rollout and of its scoring differ.

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
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"warpdecode.hf needs torch and transformers; importing them failed: {error}") from error

from .config import WarpDecodeFallbackError, WarpDecodeFallbackWarning
from .decode import DecodeAcceleration, accelerate_decode
from .explain import Explanation, LayerRow, explain
from .forward import register
from .patch import patch, patched, unpatch

__all__ = [
    "DecodeAcceleration",
    "Explanation",
    "LayerRow",
    "WarpDecodeFallbackError",
    "WarpDecodeFallbackWarning",
    "accelerate_decode",
    "explain",
    "patch",
    "patched",
    "register",
    "unpatch",
]
