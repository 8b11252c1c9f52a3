"""Timers: rounds of calls, candidates in a fresh order within each repeat; medians, 10th and 90th percentiles."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import torch


def summary(samples: list[float]) -> dict:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"median": statistics.median(samples), "p10": tenths[0], "p90": tenths[-1]}


def shuffled(candidates: dict) -> list:
    """The candidates in a new order: who runs behind whom decides what a large cache still holds."""
    items = list(candidates.items())
    random.shuffle(items)
    return items


class CpuTimer:
    """Wall clock of a round of calls divided by their number."""

    calls = 4

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.cache_bytes = self._last_level_cache()

    @staticmethod
    def _last_level_cache() -> int:
        sizes = [32 << 20]  # where the system does not say
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
        # A virtual machine may show its host's cache, of which it has a share: rotating over a gigabyte is enough.
        return min(max(sizes), 256 << 20)

    def time(self, candidates: dict) -> dict:
        """Microseconds per call of each candidate."""
        samples = {name: [] for name in candidates}
        for repeat in range(self.repeats + 1):
            for name, calls in shuffled(candidates):
                start = time.perf_counter()
                for call in calls:
                    call()
                if repeat:  # the first round warms up
                    samples[name].append((time.perf_counter() - start) / len(calls) * 1e6)
        return {name: summary(values) for name, values in samples.items()}


class CudaTimer:
    """CUDA events around the replay of a graph that holds a round of calls; eager calls where none can be captured."""

    calls = 16

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    @staticmethod
    def _capture(calls):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _runner(self, calls):
        if getattr(calls, "eager", False):
            return lambda: [call() for call in calls]
        return self._capture(calls)

    def time(self, candidates: dict) -> dict:
        """Microseconds per call of each candidate."""
        runners = {name: self._runner(calls) for name, calls in candidates.items()}
        samples = {name: [] for name in candidates}
        for repeat in range(self.repeats + 3):
            for name, run in shuffled(runners):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                end.synchronize()
                if repeat >= 3:  # the first rounds warm up
                    samples[name].append(start.elapsed_time(end) * 1e3 / len(candidates[name]))
        return {name: summary(values) for name, values in samples.items()}
