"""What a figure depends on beside the code: versions, machine, clocks, commit, date."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch

import warpdecode

_CLOCKS = {
    "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "most_sm_mhz": "clocks.max.sm", "power_limit_w": "power.limit",
}  # fmt: skip


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _smi(fields: str) -> list[str] | None:
    """nvidia-smi's values for the current CUDA device; None where it does not say them of this one."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    # torch counts the visible devices only, nvidia-smi all of them: the identifier is common to both
    found = _output(*query, *(("-i", f"GPU-{uuid}") if uuid else ()))
    lines = found.splitlines() if found else []
    return [value.strip() for value in lines[0].split(",")] if len(lines) == 1 else None


def clocks(work: Callable[[], object]) -> dict | None:
    """Clocks and power limit while the GPU does this work again and again: an idle one shows what it could do. None
    without nvidia-smi."""
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(_smi, ",".join(_CLOCKS.values()))
        while not asked.done():
            work()
    values = asked.result()
    if values is None:
        return None
    return {name: _number(value) for name, value in zip(_CLOCKS, values, strict=False)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def commit_of(path: Path) -> str | None:
    """The commit of the git checkout that a file is tracked in, with -dirty; None for an installed package."""
    git = ("git", "-C", str(path.parent))
    # A virtual environment inside some other project's checkout must not give that project's commit.
    if _output(*git, "ls-files", "--error-unmatch", path.name) is None:
        return None
    commit, changes = _output(*git, "rev-parse", "HEAD"), _output(*git, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("-dirty" if changes else "")


def environment(device: str, commit: str | None = None, args: argparse.Namespace | None = None) -> dict:
    """The part of a row that says where and with what it was measured.

    commit: where it is known otherwise. args: the command's, of which `options` has what was given or is the default.
    """
    found = {
        "warpdecode": warpdecode.version(),
        "commit": commit or commit_of(Path(warpdecode.__file__)),
        "numerics": warpdecode.numerics_id(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "threads": warpdecode.get_num_threads(),
        "torch_threads": torch.get_num_threads(),
    }
    if args is not None:
        found["options"] = _options(args)
    for package in ("transformers", "triton", "vllm"):
        version = _version(package)
        if version:
            found[package] = version
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver_cuda"] = warpdecode.cuda_devices()[0].driver_cuda
        found["driver"] = (_smi("driver_version") or [None])[0]
    else:
        found["processor"] = _processor()
        found["kernel"] = next(k.name for k in warpdecode.kernels() if k.device == "cpu" and k.usable)
    return found


def _options(args: argparse.Namespace) -> dict:
    """The options that say what was measured; those that were left away and have no default are not among them."""
    told = {name: value for name, value in vars(args).items() if name not in ("command", "commit", "output")}
    return {name: value for name, value in told.items() if value not in (None, "") and value is not False}


def _processor() -> str:
    """The processor's model; Linux has it in a file, and platform knows the architecture alone there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == "model name")
    return next(models, "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
