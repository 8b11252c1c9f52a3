"""Decode steps of `generate()`, variant by variant in turn, after all of them are warm."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from warpdecode.bench.decode_floor import logits_and_distinct, logits_of_another_path, read_milliseconds
from warpdecode.bench.generation import Generation, generate
from warpdecode.bench.step_kernels import kernels_of_a_step
from warpdecode.bench.timers import reason, summary
from warpdecode.bench.variants import STOCK

_FEW = 8  # new tokens of the slowest variants, and of a first generation where nothing is compiled
_SETTLED = 0.1  # two generations whose steps differ by less are of one kind: no compilation, no recording any more
_MOST_WARM = 5


@dataclass(frozen=True)
class Settings:
    """new_tokens: of a generation, fewer where it would take more than most_seconds."""

    new_tokens: int = 64
    prompt_tokens: int = 32
    rounds: int = 3
    most_seconds: float = 8.0
    compile_config: Any = None  # of transformers; None: its own choice
    kernels: bool = False  # record the kernels of a step, too: on a GPU


@dataclass
class _Variant:
    model: torch.nn.Module
    new_tokens: int = 0
    compiled: dict | None = None
    taken: list[Generation] = field(default_factory=list)


def measure(
    models: dict[str, torch.nn.Module], mode: str, batch: int, settings: Settings, say: Callable[[str], None]
) -> list[dict]:
    """One row for each variant's model, in their order. One that cannot run has `failed`, the reason, and no times."""
    _forget()
    some = next(iter(models.values()))
    prompt = torch.randint(0, some.config.vocab_size, (batch, settings.prompt_tokens), device=some.device)
    variants = {name: _Variant(model) for name, model in models.items()}
    failed: dict[str, str] = {}
    # Variants share the code that is compiled: torch counts the compilations of all of them as one function's.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name, variant in variants.items():
            start = time.perf_counter()
            try:
                step = _warm(variant, prompt, mode == "static", settings)
            except Exception as error:
                failed[name] = reason(error)
                say(f"{name} left out: {failed[name]}")
                continue
            seconds = time.perf_counter() - start
            say(f"{name} warm after {seconds:.1f} s: {1e3 * step:.2f} ms a step {variant.compiled or ''}")
        running = {name: variant for name, variant in variants.items() if name not in failed}
        before = _compiled()
        for _ in range(settings.rounds):
            for variant in running.values():
                variant.taken.append(_generate(variant, prompt, mode == "static", settings, variant.new_tokens))
        again = _compiled()["graphs"] - before["graphs"]
    if again:
        say(f"{again} graphs were compiled while times were taken: the slowest steps are theirs")
    rows = [
        {"mode": mode, "batch": batch, "variant": name, **_times(running[name], batch)}
        if name in running
        else {"mode": mode, "batch": batch, "variant": name, "failed": failed[name]}
        for name in variants
    ]
    common = {
        "prompt_tokens": settings.prompt_tokens, "asked_tokens": settings.new_tokens, "rounds": settings.rounds,
        "graphs_while_timed": again,
    }  # fmt: skip
    common |= _compared(rows)
    common |= _looked_at(running, rows, settings.prompt_tokens)
    if settings.kernels:  # last: where torch's profiler was, graphs may be slower
        for row in (row for row in rows if row["variant"] in running):
            variant = running[row["variant"]]
            row["kernels"] = kernels_of_a_step(
                lambda tokens, variant=variant: _generate(variant, prompt, mode == "static", settings, tokens),
                settings.new_tokens,
            )
    return [{**row, **common} for row in rows]


def _generate(variant: _Variant, prompt, static: bool, settings: Settings, new_tokens: int) -> Generation:
    return generate(variant.model, prompt, new_tokens, static=static, compile_config=settings.compile_config)


def _warm(variant: _Variant, prompt, static: bool, settings: Settings) -> float:
    """Runs a variant until its steps are what they will be. Returns the last generation's, in seconds."""
    before, start = _compiled(), time.perf_counter()
    # The cache of a first generation decides the shapes that are compiled, so with a static one it is a full one.
    first = _generate(variant, prompt, static, settings, settings.new_tokens if static else _FEW)
    seconds = time.perf_counter() - start
    affordable = int(settings.most_seconds / first.step)
    variant.new_tokens = min(settings.new_tokens, max(_FEW, affordable))
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


def _looked_at(running: dict[str, _Variant], rows: list[dict], prompt_tokens: int) -> dict:
    """How many experts a step reads, and how long that alone takes. Adds to our row how far our logits are from stock's
    on the text that stock wrote, and how far those of two of transformers' own paths are from each other."""
    judge = next((name for name in running if name in STOCK), None)
    if judge is None:
        return {}
    text = running[judge].taken[-1].tokens
    logits, distinct = logits_and_distinct(running[judge].model, text)
    if "patched" in running:
        ours, _ = logits_and_distinct(running["patched"].model, text)
        generated = running["patched"].taken[-1].tokens
        new = slice(prompt_tokens, min(text.shape[1], generated.shape[1]))
        row = next(row for row in rows if row["variant"] == "patched")
        row["largest_logit_difference"] = (logits - ours).abs().max().item()
        row["stock_logit_difference"] = (logits - logits_of_another_path(running[judge].model, text)).abs().max().item()
        row["logit_standard_deviation"] = logits.std().item()
        row["equal_tokens"] = (text[:, new] == generated[:, new]).float().mean().item()
    return {"distinct_experts": distinct, "read_floor_ms": read_milliseconds(running[judge].model, distinct)}
