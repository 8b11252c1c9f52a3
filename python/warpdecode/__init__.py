"""warpdecode: warp decode kernels for Mixture-of-Experts layers, from any framework, with or without a GPU.

    import warpdecode
    out = warpdecode.moe(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)

`Experts` keeps a layer's description between calls, `warpdecode.hf` patches Hugging Face models, `warpdecode.info()`
says what this build and this machine offer.
"""

from warpdecode.build_info import (
    CudaDevice,
    Kernel,
    cuda_devices,
    cuda_usable,
    info,
    kernels,
    numerics_id,
    version,
)
from warpdecode.kernels3d import moe_down_3d_batched, moe_gate_up_3d_batched
from warpdecode.ops import Experts, moe
from warpdecode.threads import get_num_threads, set_num_threads

__version__ = version()


def __getattr__(name: str):
    # So that `import warpdecode` is enough, and costs those who do not use them neither torch nor transformers.
    if name == "hf":
        import importlib

        return importlib.import_module("warpdecode.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CudaDevice",
    "Experts",
    "Kernel",
    "cuda_devices",
    "cuda_usable",
    "get_num_threads",
    "info",
    "kernels",
    "moe",
    "moe_down_3d_batched",
    "moe_gate_up_3d_batched",
    "numerics_id",
    "set_num_threads",
    "version",
]
