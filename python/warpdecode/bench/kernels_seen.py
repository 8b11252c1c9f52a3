"""Which CUDA kernels ran: the names that torch's profiler sees in what was timed, so that a row shows it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from warpdecode.bench.layouts import label

_MARK = "spin_kernel"  # of torch.cuda._sleep, between the candidates of one recording

# What a call must have run for its figures to mean what they say; for layouts and forced kernels see _expected.
_EXPECTED = {
    "warpdecode": ("gate_up", "down"),
    "gate_up": ("gate_up",),
    "down": ("down",),
    "read ceiling": ("read_memory",),
    "two reads": ("read_memory",),
    "vllm": ("fused_moe",),
}


def _expected(name: str) -> tuple[str, ...]:
    """Parts of the names of the kernels that a candidate must have run."""
    if name.startswith("cuda_"):
        schedule = name.removeprefix("cuda_")
        return f"gate_up_{schedule}", f"down_{schedule}"
    if name.startswith(label("")):
        return "gate_up", "down"
    return _EXPECTED.get(name, ())


def shortened(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    for opening in "<(":
        name = name.split(opening, 1)[0]
    return name.strip().split("::")[-1][:80]


def recorded(call: Callable) -> list:
    """The events of all kernels that a call runs on the GPU, in the order in which they started."""
    # A process that captures graphs must not have the profiler's hooks removed and put back (torch sets the same for
    # the versions that crashed).
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(events, key=lambda event: event.time_range.start)


def _all_marked(calls: dict[str, Callable]) -> None:
    for call in calls.values():
        torch.cuda._sleep(1000)
        call()


def kernels_seen(calls: dict[str, Callable]) -> dict[str, list[str]] | None:
    """The kernels of each candidate, each name once; None where the profiler sees none."""
    groups: list[list[str]] = []
    for event in recorded(lambda: _all_marked(calls)):
        if _MARK in event.name:
            groups.append([])
        elif groups:
            groups[-1].append(shortened(event.name))
    if len(groups) != len(calls) or not any(groups):
        return None
    return {name: list(dict.fromkeys(group)) for name, group in zip(calls, groups, strict=True)}


def unexpected(seen: dict[str, list[str]]) -> dict[str, str]:
    """A sentence for each candidate that ran other kernels than its own."""
    found = {}
    for name, kernels in seen.items():
        missing = [part for part in _expected(name) if not any(part in kernel for kernel in kernels)]
        if missing:
            found[name] = f"it ran no kernel named {missing[0]}, but {', '.join(kernels) or 'none'}"
    return found
