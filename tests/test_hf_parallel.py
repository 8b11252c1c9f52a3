"""Tensor and expert parallelism as transformers does them: real processes, each with its part of the experts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import hf_models
import hf_parallel
import reference

WORLD = 2


def _run_ranks(how: str, dtypes: str, device: str, directory: Path) -> list[dict]:
    """What each rank saw, by dtype."""
    hf_models.build("qwen3_moe").save_pretrained(directory / "model")
    command = [sys.executable, hf_parallel.__file__, how, dtypes, device, str(directory)]
    ranks = []
    for rank in range(WORLD):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        with (directory / f"log.{rank}").open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=hf_parallel.TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = "\n".join((directory / f"log.{rank}").read_text()[-3000:] for rank in range(WORLD))
    assert codes == [0] * WORLD, logs
    return [torch.load(directory / f"rank.{rank}") for rank in range(WORLD)]


def _numpy(tensors) -> list:
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def _parts(how: str, module, inputs_by_rank) -> list[torch.Tensor]:
    """In FP64, the summands that are rounded and then added: each rank's share of the layer, or, where tokens travel
    to the experts, each slot's."""
    x, ids, weights = _numpy(inputs_by_rank[0])
    # Releases differ in where a rank's own experts are picked out: inside the module, or by the router before it, which
    # then gives each rank its own numbers and marks the others' experts with the number after the last.
    before = not torch.equal(inputs_by_rank[0][1], inputs_by_rank[1][1])
    gate_up, down = (w.double().numpy() for w in (module.gate_up_proj, module.down_proj))
    experts, _, intermediate = down.shape
    parts = []
    if how.endswith("all_to_all"):
        for k in range(ids.shape[1]):
            parts.append(reference.moe(x, ids[:, k : k + 1], weights[:, k : k + 1], gate_up, down, "silu"))
    else:
        for rank in range(WORLD):
            if how == "tensor parallel":
                rows = slice(rank * intermediate // WORLD, (rank + 1) * intermediate // WORLD)
                gate, up = gate_up[:, :intermediate][:, rows], gate_up[:, intermediate:][:, rows]
                packed = torch.cat([torch.from_numpy(gate), torch.from_numpy(up)], 1).numpy()
                parts.append(reference.moe(x, ids, weights, packed, down[:, :, rows], "silu"))
                continue
            share = experts // WORLD
            if before:
                _, ids, weights = _numpy(inputs_by_rank[rank])
                own, ids = ids < share, ids + rank * share
            else:
                own = ids // share == rank
            # Of no weight where the expert is another rank's, which a router may have said with a NaN.
            parts.append(reference.moe(x, ids * own - ~own, weights, gate_up, down, "silu"))
    return [torch.from_numpy(part) for part in parts]


def _layer_bound(parts: list[torch.Tensor], dtype: torch.dtype, roundings: int) -> float:
    """Bound of the norm of a layer's error: every part is as exact as a call of its own, is then rounded `roundings`
    times more (its routing weight, its addition), and the sum once."""
    unit = torch.finfo(dtype).eps / 2
    each = sum((cases.error_bound(part, dtype) + roundings * unit) * part.norm().item() for part in parts)
    return each + unit * sum(parts).norm().item()


def _check(how: str, dtypes: str, device: str, directory: Path) -> None:
    ranks = _run_ranks(how, dtypes, device, directory)
    for name in dtypes.split():
        dtype, seen = getattr(torch, name), [rank[name] for rank in ranks]
        single = hf_models.build("qwen3_moe").to(dtype).requires_grad_(False)
        modules = hf_models.experts_modules(single)
        experts, hidden, intermediate = modules[0].down_proj.shape
        if how == "tensor parallel":
            assert all(rank["sizes"] == [(experts, hidden, intermediate // WORLD)] * len(modules) for rank in seen)
        else:
            assert all(rank["sizes"] == [(experts // WORLD, hidden, intermediate)] * len(modules) for rank in seen)
        roundings = 2 if how.endswith("all_to_all") else 0
        for module, *calls in zip(modules, *(rank["layers"] for rank in seen), strict=True):
            parts = _parts(how, module, [inputs for inputs, _ in calls])
            assert all(part.norm() > 0 for part in parts), "a rank without work"
            for _, output in calls:
                error = (output.double() - sum(parts)).norm().item()
                assert error <= _layer_bound(parts, dtype, roundings)
        assert torch.equal(seen[0]["logits"], seen[1]["logits"])
        if dtype == torch.float32:  # in fewer bits, rounding sends tokens to other experts
            exact = single.double()(hf_models.prompt()).logits
            ours, own = ((seen[0][path].double() - exact).pow(2).mean().sqrt() for path in ("logits", "own"))
            assert exact.std() > 1 and 0 < own < 1e-4
            assert ours <= 2 * own  # both keep FP32 sums; only their order differs


ONE_WAY = "this transformers has one way of expert parallelism"
HOW = [
    "tensor parallel",
    "expert parallel, auto",
    pytest.param("expert parallel, all_to_all", marks=pytest.mark.skipif(not hf_parallel.HAS_WAYS, reason=ONE_WAY)),
]


@pytest.mark.parametrize("how", HOW)
def test_two_processes_compute_what_one_does(how, tmp_path):
    _check(how, "float32 bfloat16", "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("how", HOW)
def test_two_gpus_compute_what_one_does(how, tmp_path):
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"gpu: needs {WORLD} CUDA devices, found {torch.cuda.device_count()}")
    _check(how, "bfloat16 float16", "cuda", tmp_path)
