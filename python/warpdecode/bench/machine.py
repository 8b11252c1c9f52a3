"""What a figure depends on beside the code: versions, machine, clocks, commit, date."""

from __future__ import annotations

import platform
import subprocess
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
    """nvidia-smi's values for the current CUDA device."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    # torch counts the visible devices only, nvidia-smi all of them: the identifier is common to both
    found = _output(*query, "-i", f"GPU-{uuid}") if uuid else None
    found = found or _output(*query)
    return [value.strip() for value in found.splitlines()[0].split(",")] if found else None


def clocks() -> dict | None:
    """Clocks and power limit at this moment; None without nvidia-smi."""
    values = _smi(",".join(_CLOCKS.values()))
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


def environment(device: str, commit: str | None = None) -> dict:
    """The part of a row that says where and with what it was measured. commit: where it is known otherwise."""
    found = {
        "warpdecode": warpdecode.version(),
        "commit": commit or commit_of(Path(warpdecode.__file__)),
        "numerics": warpdecode.numerics_id(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "threads": warpdecode.get_num_threads(),
    }
    for package in ("transformers", "triton", "vllm"):
        version = _version(package)
        if version:
            found[package] = version
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver_cuda"] = warpdecode.cuda_devices()[0].driver_cuda
        found["driver"] = (_smi("driver_version") or [None])[0]
    else:
        found["processor"] = platform.processor() or platform.machine()
        found["kernel"] = next(k.name for k in warpdecode.kernels() if k.device == "cpu" and k.usable)
    return found


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
