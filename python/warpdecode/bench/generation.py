"""One timed `generate()`: when each of its tokens was there, and what its decode steps ran.

The clock is the host's, at the moment at which a token has been copied to it: `generate()` waits for every step anyway,
to see whether it is the last one. So a step is whatever lies between two tokens, as the caller feels it; the first
token, which the prompt's pass and a first compilation belong to, is told apart.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from warpdecode.bench.variants import experts_of, running


class _Arrivals:
    """A streamer, as generate() takes one: notes when it is given the prompt and then each step's tokens."""

    def __init__(self, now_running: Callable[[], str]):
        self.times: list[float] = []
        self.ran: set[str] = set()
        self._now_running = now_running

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 2:  # the prompt is the first one, its pass gives the second
            self.ran.add(self._now_running())

    def end(self) -> None:
        pass


@dataclass
class Generation:
    """seconds: of the whole call. first: until the first token. steps: of each later token."""

    seconds: float
    first: float
    steps: list[float]
    ran: str  # the experts' implementation of the decode steps
    tokens: torch.Tensor = field(repr=False)  # [batch, prompt + new]

    @property
    def step(self) -> float:
        """The median step."""
        return statistics.median(self.steps)


def generate(
    model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int, *, static: bool, compile_config=None
) -> Generation:
    """Generates exactly new_tokens a row, at least 2, greedily.

    static: with a static cache, where transformers compiles the decode step on a GPU by itself; otherwise its default.
    """
    experts = experts_of(model)[0]
    arrivals = _Arrivals(lambda: running(experts))
    options = {"cache_implementation": "static", "compile_config": compile_config} if static else {}
    _synchronize(prompt)
    start = time.perf_counter()
    with torch.no_grad():
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, streamer=arrivals, **options,
        )  # fmt: skip
    _synchronize(prompt)
    seconds = time.perf_counter() - start
    times = arrivals.times
    if len(times) != new_tokens + 1:
        raise RuntimeError(f"generate() gave {len(times) - 1} tokens where {new_tokens} were asked for")
    steps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return Generation(seconds, times[1] - start, steps, " and ".join(sorted(arrivals.ran)), tokens)


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
