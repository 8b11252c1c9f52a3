"""What this build is, what this machine offers it, and why CUDA is not usable where it is not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass

from warpdecode import threads
from warpdecode._ffi import OK, check, ffi, last_error, lib, new_struct


@dataclass(frozen=True)
class Kernel:
    """A row of the library's table, best first for each device."""

    name: str
    description: str
    device: str  # "cpu" or "cuda"
    usable: bool  # on this machine


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device as the library sees it."""

    index: int
    name: str
    compute_capability: str
    num_sms: int
    l2_bytes: int
    memory_bytes: int
    driver_cuda: str  # newest CUDA version the driver serves


def version() -> str:
    """The library's version."""
    return ffi.string(lib.wd_version()).decode()


def numerics_id() -> str:
    """A short string that changes whenever any bit of any output may change."""
    return ffi.string(lib.wd_numerics_id()).decode()


def kernels() -> list[Kernel]:
    """All kernels of this build."""
    rows = []
    for index in range(lib.wd_kernel_count()):
        row = new_struct("wd_kernel_info")
        check(lib.wd_get_kernel_info(index, row))
        device = "cuda" if row.device_type == lib.kDLCUDA else "cpu"
        rows.append(
            Kernel(ffi.string(row.name).decode(), ffi.string(row.description).decode(), device, bool(row.usable))
        )
    return rows


def cuda_usable() -> tuple[bool, str]:
    """Whether CUDA tensors can be served here, and the exact reason when they cannot."""
    count = ffi.new("int32_t *")
    if lib.wd_cuda_device_count(count) != OK:
        return False, last_error()
    if count[0] == 0:
        return False, "CUDA: the driver works, but shows no device (CUDA_VISIBLE_DEVICES?)"
    return True, ""


def _version_text(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_devices() -> list[CudaDevice]:
    """The usable CUDA devices; empty where there are none (`cuda_usable` says why)."""
    if not cuda_usable()[0]:
        return []
    count = ffi.new("int32_t *")
    check(lib.wd_cuda_device_count(count))
    devices = []
    for index in range(count[0]):
        row = new_struct("wd_cuda_device_info")
        check(lib.wd_get_cuda_device_info(index, row))
        capability = f"{row.compute_capability // 10}.{row.compute_capability % 10}"
        devices.append(
            CudaDevice(index, ffi.string(row.name).decode(), capability, row.num_sms, row.l2_bytes, row.memory_bytes,
                       _version_text(row.driver_version))
        )  # fmt: skip
    return devices


def _installed(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def info() -> str:
    """The report of `warpdecode info`: versions, build, devices, kernels."""
    build = new_struct("wd_build_info")
    check(lib.wd_get_build_info(build))
    lines = [
        f"warpdecode {version()}, numerics {numerics_id()}",
        f"python     {platform.python_version()} ({sys.executable})",
        f"packages   {_installed('torch', 'transformers', 'numpy', 'cffi', 'jax')}",
    ]
    if build.cuda_compiled:
        architectures = ffi.string(build.cuda_architectures).decode()
        lines.append(f"build      CPU and CUDA {_version_text(build.cuda_runtime_version)} for {architectures}")
    else:
        lines.append("build      CPU ONLY: no CUDA kernels are compiled in")
    lines.append(f"compiler   {ffi.string(build.compiler).decode()}")
    lines.append(f"threads    {threads.get_num_threads()}")
    usable, reason = cuda_usable()
    if not usable:
        lines.append(f"devices    none: {reason}")
    for device in cuda_devices():
        size = f"{device.num_sms} SMs, {device.memory_bytes / 2**30:.0f} GiB, L2 {device.l2_bytes / 2**20:.0f} MiB"
        lines.append(
            f"device {device.index}   {device.name}, compute capability {device.compute_capability}, {size}, "
            f"driver for CUDA {device.driver_cuda}"
        )
    lines.append("kernels    (best first; all of a device give the same bits)")
    for kernel in kernels():
        mark = "" if kernel.usable else " [not usable here]"
        lines.append(f"  {kernel.name:<13}{kernel.description}{mark}")
    return "\n".join(lines)
