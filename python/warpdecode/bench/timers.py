"""Timers: rounds of calls, candidates in a fresh order within each repeat; medians, 10th and 90th percentiles."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import warpdecode
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.failures import reason

# Rough speeds of a large GPU, bytes and operations a second. Only the number of calls in a round depends on them.
_READ, _COMPUTE = 4e12, 400e12
_ROUND_SECONDS = 5e-3  # what a replay should take at least, if 16 calls do


def summary(samples: list[float]) -> dict:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {"median": statistics.median(samples), "p10": tenths[0], "p90": tenths[-1]}


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """torch works on as many CPU threads as this library, so that neither is timed on more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(warpdecode.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summaries(candidates: dict[str, Candidate], samples: dict[str, list[float]]) -> dict[str, dict]:
    """Microseconds of a call, of the seconds of rounds."""
    return {
        name: summary([1e6 * seconds / len(candidates[name].calls) for seconds in values])
        for name, values in samples.items()
    }


class Timer:
    """Microseconds per call of candidates. A subclass says how a round is run and how long it takes.

    failed: what could not be run of the last candidates, and why; such a one has no times, wherever it failed. taken:
    how many times the others were measured. rounds: what ran a round of each of those; it holds their graphs.
    """

    warm = 1
    row_seconds = 60.0  # rows of calls so slow that all repeats would take longer get fewer of them

    def __init__(self, repeats: int, cache_bytes: int):
        self.repeats, self.cache_bytes = repeats, cache_bytes
        self.failed: dict[str, str] = {}
        self.taken = 0
        self.rounds: dict[str, Callable[[], float]] = {}

    def _runner(self, candidate: Candidate) -> Callable[[], float]:
        """A function that runs the round once and returns its seconds."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Waits for what was enqueued."""

    def time(self, candidates: dict[str, Candidate]) -> dict[str, dict]:
        """Summary of each candidate that could be run."""
        samples, self.rounds = self._measured(candidates, self._runner, self.warm)
        self.taken = min(map(len, samples.values()), default=0)
        return _summaries(candidates, samples)

    def time_eager(self, candidates: dict[str, Candidate]) -> dict[str, dict]:
        """Summary of a call's wall time from Python, all of a round enqueued before the one wait at its end."""
        samples, _ = self._measured(candidates, lambda each: functools.partial(self._wall, each.calls))
        return _summaries(candidates, samples)

    def _measured(self, candidates: dict[str, Candidate], runner_of: Callable, warm: int = 1) -> tuple[dict, dict]:
        """Seconds of the rounds of each candidate that could run them all (fewer than `repeats` where those would take
        longer than row_seconds), and what ran them.

        The order is new in each repeat: who runs behind whom decides what a large cache still holds.
        """
        runners: dict[str, Callable[[], float]] = {}
        self.failed = {}

        def tried(name, step, *values):  # what a step returns; None once it has failed
            try:
                return step(*values)
            except Exception as error:
                if candidates[name].required:
                    raise
                self.failed[name] = reason(error)
                runners.pop(name, None)

        for name, candidate in candidates.items():
            if runner := tried(name, runner_of, candidate):
                runners[name] = runner
        samples: dict[str, list[float]] = {name: [] for name in runners}
        repeat, repeats = 0, self.repeats
        while repeat < repeats + warm:
            items, start = list(runners.items()), time.perf_counter()
            random.shuffle(items)
            for name, run in items:
                seconds = tried(name, run)
                if repeat >= warm:
                    samples[name].append(seconds)
            if repeat == warm - 1:
                affordable = int(self.row_seconds / (time.perf_counter() - start))
                repeats = min(repeats, max(3, affordable))
            repeat += 1
        return {name: samples[name] for name in runners}, runners

    def _wall(self, calls: list[Callable]) -> float:
        self.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        self.synchronize()
        return time.perf_counter() - start


def cuda_calls(cache_bytes: int, call_bytes: int, call_flops: float) -> int:
    """16 calls in a round, fewer of long ones, and of very short ones as many as read four times what the L2 holds."""
    seconds = max(call_bytes / _READ, call_flops / _COMPUTE)
    few = min(max(math.ceil(_ROUND_SECONDS / seconds), 2), 16)
    return max(few, -(-4 * cache_bytes // call_bytes))


class CpuTimer(Timer):
    """Wall clock of a round of calls divided by their number."""

    def __init__(self, repeats: int | None):
        super().__init__(repeats or 20, self._last_level_cache())

    @staticmethod
    def _last_level_cache() -> int:
        sizes = [32 << 20]  # where the system does not say
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
        # A virtual machine may show its host's cache, of which it has a share: rotating over a gigabyte is enough.
        return min(max(sizes), 256 << 20)

    def calls(self, copies: int, call_bytes: int, call_flops: float) -> int:
        """How many calls a round has: each copy once, and so many that a round reads four times what the cache holds.

        With less the next candidate, where it reads the same experts, found them there: the read ceiling, which follows
        or precedes the two reads, came out an eighth too fast.
        """
        return max(4, copies, -(-4 * self.cache_bytes // call_bytes))

    def _measured(self, *what):
        with torch_threads():
            return super()._measured(*what)

    def _runner(self, candidate):
        candidate.calls[0]()  # what cannot run fails here
        return lambda: self._wall(candidate.calls)


class CudaTimer(Timer):
    """CUDA events around the replay of a graph that holds a round of calls; eager calls where none can be captured."""

    warm = 2
    row_seconds = 4.0

    def __init__(self, repeats: int | None):
        super().__init__(repeats or 11, torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
        self._pool = None

    def calls(self, copies: int, call_bytes: int, call_flops: float) -> int:
        """See cuda_calls."""
        return cuda_calls(self.cache_bytes, call_bytes, call_flops)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time(self, candidates):
        # Graphs of one row share a pool of memory: each replay writes what it reads of it, and the next row's beginning
        # ends them all.
        self._pool = torch.cuda.graph_pool_handle()
        return super().time(candidates)

    def _capture(self, calls):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                for call in calls:
                    call()
        except Exception:
            torch.cuda.set_stream(stream)  # a capture that fails while ending leaves its own behind
            self._pool = torch.cuda.graph_pool_handle()  # the old one may be left half in use
            raise
        return graph.replay

    def _runner(self, candidate):
        run = self._capture(candidate.calls) if candidate.capturable else lambda: [call() for call in candidate.calls]

        def seconds():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return seconds
