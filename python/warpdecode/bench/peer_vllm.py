"""vLLM's fused_experts as a peer: its Triton kernels, with the table tuned for this GPU where it has one.

Written against vLLM 0.26. With VLLM_BATCH_INVARIANT=1 in the environment of the process the same function is
batch-invariant: `child.py` measures it so, in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch

from warpdecode.bench.candidates import Candidate, flops
from warpdecode.bench.failures import reason

_PACKAGE = "vllm.model_executor.layers.fused_moe"


@functools.cache
def load():
    """vLLM's (module of the kernel, activations). Raises what its import raises."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the table's
    kernel = importlib.import_module(f"{_PACKAGE}.fused_moe")
    activations = importlib.import_module(f"{_PACKAGE}.activation").MoEActivation
    return kernel, activations


def candidates(layers, inputs: list, *, eager: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The fused layer; ids and weights as vLLM's own router gives them, int32 and float32. No input is changed. Nothing
    is left out on purpose."""
    kernel, activations = load()
    activation = activations.from_str(layers.shape.activation)
    calls = [
        functools.partial(
            kernel.fused_experts, x, layers.gate_up[i % layers.copies], layers.down[i % layers.copies],
            weights, ids.to(torch.int32), activation=activation,
        )
        for i, (x, ids, weights) in enumerate(inputs)
    ]  # fmt: skip
    return {"vllm": Candidate(calls, flops(layers, len(inputs[0][0])))}, {}


def configuration(layers, tokens: int) -> dict:
    """Whether this process is batch-invariant, the tuned table that vLLM found for this GPU and shape (None: its
    defaults) and what it takes from it."""
    kernel, _ = load()
    shape, found = layers.shape, {}
    try:  # functions of vLLM's own, which another version may have moved
        found["batch_invariant"] = bool(kernel.envs.VLLM_BATCH_INVARIANT)
        table = kernel.get_config_file_name(shape.experts, shape.intermediate, None)
        tuned = kernel.get_moe_configs(shape.experts, shape.intermediate, None, 0, 0) is not None
        found["table"] = table if tuned else None
        found["config"] = dict(
            kernel.try_get_optimal_moe_config(layers.gate_up[0].shape, layers.down[0].shape, shape.top_k, None, tokens)
        )
    except Exception as error:
        found["unknown"] = reason(error)
    return found
