"""One rank of a model that transformers spreads over several processes; test_hf_parallel.py starts them.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 python tests/hf_parallel.py HOW DTYPES DEVICE DIRECTORY

DIRECTORY has the model in model/ and gets rank.N, for each dtype a dict of what this rank saw.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import hf_models
import warpdecode.hf

TIMEOUT_S = 150
HAS_WAYS = "ep_size" in DistributedConfig.__dataclass_fields__  # ways of expert parallelism to choose from


def _load(how: str, directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    world = dist.get_world_size()
    spread = {"tp_size": world}
    if how == "tensor parallel":
        spread["tp_plan"] = "auto"
    elif HAS_WAYS:
        spread |= {"ep_size": world, "ep_implementation": how.removeprefix("expert parallel, ")}
    else:
        spread["enable_expert_parallel"] = True
    return AutoModelForCausalLM.from_pretrained(
        directory / "model",
        dtype=dtype,
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(**spread),
    ).eval()


@torch.no_grad()
def _run(model: torch.nn.Module) -> dict:
    """The logits by the model's own path and by the kernels, and each layer's inputs and output by the kernels."""
    tokens = hf_models.prompt().to(model.device)
    own = model(tokens).logits.cpu()
    warpdecode.hf.patch(model, strict=True)
    rows = warpdecode.hf.explain(model)
    assert all(row.path == "warp_decode" for row in rows), rows
    layers = []

    def keep(module, inputs, output):
        layers.append(([t.clone().cpu() for t in inputs], output.clone().cpu()))

    hooks = [module.register_forward_hook(keep) for module in hf_models.experts_modules(model)]
    with hf_models.counted_kernel_calls() as served:
        logits = model(tokens).logits.cpu()
    for hook in hooks:
        hook.remove()
    assert len(served) == len(layers) == hf_models.MOE_LAYERS, f"{len(served)} calls served"
    return {"own": own, "logits": logits, "layers": layers, "sizes": [(row.E, row.H, row.I) for row in rows]}


def main(how: str, dtypes: str, device: str, directory: str) -> None:
    rank, world, directory = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(directory)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(
        {name: _run(_load(how, directory, getattr(torch, name))) for name in dtypes.split()}, directory / f"rank.{rank}"
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
