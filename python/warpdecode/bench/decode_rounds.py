"""Decode steps of `generate()`, variant by variant in turn, after all of them are warm."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from warpdecode.bench.decode_looks import Looks
from warpdecode.bench.decode_settings import Settings
from warpdecode.bench.failures import reason
from warpdecode.bench.generation import Generation, generate
from warpdecode.bench.step_kernels import kernels_of_a_step
from warpdecode.bench.timers import summary
from warpdecode.bench.variant_names import STOCK
from warpdecode.bench.variants import model_of

_FEW = 8  # new tokens of the slowest variants, and of a first generation where nothing is compiled
_SETTLED = 0.1  # two generations whose steps differ by less are of one kind: no compilation, no recording any more
_MOST_WARM = 5


@dataclass
class _Variant:
    model: torch.nn.Module
    new_tokens: int = 0
    compiled: dict | None = None
    taken: list[Generation] = field(default_factory=list)


def measure(
    model: torch.nn.Module, names: Sequence[str], mode: str, batch: int, settings: Settings, say: Callable[[str], None]
) -> list[dict]:
    """One row for each variant of the model, in their order. One that cannot run has `failed`, the reason, and no
    times; one that could be timed, but not looked at, has `not_looked_at`, the reasons."""
    _forget()
    static, running, failed = mode == "static", {}, {}
    size = (batch, settings.prompt_tokens)
    # Made where a failure is caught: a batch may be too large even for this.
    prompt = functools.cache(lambda: torch.randint(0, model.config.vocab_size, size, device=model.device))

    def leave_out(name: str, error: Exception) -> None:
        running.pop(name, None)
        failed[name] = reason(error)
        say(f"{name} left out: {failed[name]}")

    # Variants share the code that is compiled: torch counts the compilations of all of them as one function's.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name in names:
            start = time.perf_counter()
            try:
                variant = _Variant(model_of(model, name))
                step = _warm(variant, prompt(), static, settings)
            except Exception as error:
                leave_out(name, error)
                continue
            running[name] = variant
            seconds = time.perf_counter() - start
            say(f"{name} warm after {seconds:.1f} s: {1e3 * step:.2f} ms a step {variant.compiled or ''}")
        if static and running and not any(variant.compiled["graphs"] for variant in running.values()):
            say("nothing was compiled: transformers did not ask for it, as it does on a GPU")
        before = _compiled()
        for _ in range(settings.rounds):
            for name, variant in list(running.items()):
                try:
                    variant.taken.append(_generate(variant, prompt(), static, settings, variant.new_tokens))
                except Exception as error:
                    leave_out(name, error)
        again = _compiled()["graphs"] - before["graphs"]
    if again:
        say(f"{again} graphs were compiled while times were taken: the slowest steps are theirs")
    rows = {
        name: {"mode": mode, "batch": batch, "variant": name}
        | (_times(running[name], batch) if name in running else {"failed": failed[name]})
        for name in names
    }
    common = {
        "prompt_tokens": settings.prompt_tokens, "asked_tokens": settings.new_tokens, "rounds": settings.rounds,
        "graphs_while_timed": again,
    }  # fmt: skip
    common |= _compared(list(rows.values()))
    for row in rows.values():
        row.update(common)
    if running:
        _look_at(running, rows, prompt(), static, settings, say)
    return list(rows.values())


def _generate(variant: _Variant, prompt, static: bool, settings: Settings, new_tokens: int) -> Generation:
    return generate(variant.model, prompt, new_tokens, static=static, compile_config=settings.compile_config)


def _warm(variant: _Variant, prompt, static: bool, settings: Settings) -> float:
    """Runs a variant until its steps are what they will be. Returns the last generation's, in seconds."""
    before, start = _compiled(), time.perf_counter()
    # The cache of a first generation decides the shapes that are compiled, so with a static one it is a full one.
    first = _generate(variant, prompt, static, settings, settings.new_tokens if static else _FEW)
    seconds = time.perf_counter() - start
    variant.new_tokens = int(min(settings.new_tokens, max(_FEW, settings.most_seconds / first.step)))
    step = first.step
    if static:  # CUDA graphs are recorded after a first run of each, and there may be one for each position
        for _ in range(_MOST_WARM):
            last, step = step, _generate(variant, prompt, static, settings, variant.new_tokens).step
            if abs(step - last) < _SETTLED * last:
                break
        found = _compiled()
        variant.compiled = {name: found[name] - before[name] for name in found} | {"seconds": round(seconds, 1)}
        if hasattr(variant.model, "_compiled_call") and variant.compiled["graphs"] == 0:
            # torch gives code up, for all variants, behind one that it cannot compile in one piece
            raise RuntimeError("its step was to be compiled, and torch made no graph of it: run it without the others")
    return step


def _forget() -> None:
    """Every batch is compiled for itself, as in a process that runs this batch alone."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compiled() -> dict:
    """What torch has compiled so far, and where it had to break a graph or to do without a CUDA graph."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def _times(variant: _Variant, batch: int) -> dict:
    steps = [step for taken in variant.taken for step in taken.steps]
    return {
        "implementation": variant.taken[-1].ran,
        "new_tokens": variant.new_tokens,
        "step_ms": summary([1e3 * step for step in steps]),
        "tokens_per_second": summary([batch / step for step in steps]),
        "generate_tokens_per_second": summary([batch * variant.new_tokens / t.seconds for t in variant.taken]),
        "first_token_ms": summary([1e3 * taken.first for taken in variant.taken]),
        "compiled": variant.compiled,
    }


def _compared(rows: list[dict]) -> dict:
    """Adds to each row how fast it is beside the fastest stock one and beside null experts. Returns which that was."""
    medians = {row["variant"]: row["step_ms"]["median"] for row in rows if "step_ms" in row}
    stock = min((name for name in medians if name in STOCK), key=medians.get, default=None)
    for row in rows:
        if row["variant"] in medians:
            mine = medians[row["variant"]]
            row["ratio_to_stock"] = medians[stock] / mine if stock else None
            row["of_null"] = medians["null"] / mine if "null" in medians else None
    return {"fastest_stock": stock}


def _look_at(
    running: dict[str, _Variant], rows: dict[str, dict], prompt, static: bool, settings: Settings, say
) -> None:
    """Adds to the rows what is looked at beside the times."""
    looks, judge = Looks(say), next((variant for name, variant in running.items() if name in STOCK), None)
    if judge:
        text = judge.taken[-1].tokens
        looks.floor(list(rows.values()), judge.model, text)
        if "patched" in running:
            ours, row = running["patched"], rows["patched"]
            looks.tokens(row, text, ours.taken[-1].tokens, settings.prompt_tokens)
            looks.logits(row, judge.model, ours.model, text)
    if settings.kernels:  # last: where torch's profiler was, graphs may be slower
        for name, variant in running.items():

            def run(tokens: int, variant=variant) -> Generation:
                return _generate(variant, prompt, static, settings, tokens)

            looks.look(
                [rows[name]], "kernels", lambda run=run: {"kernels": kernels_of_a_step(run, settings.new_tokens)}
            )
