"""The measurement of one layer: cold weights, fresh routings, every candidate on the same inputs."""

from __future__ import annotations

import math

import torch

import warpdecode
from warpdecode.bench import candidates as ours
from warpdecode.bench import options, peer_vllm, peers
from warpdecode.bench.failures import reason, say
from warpdecode.bench.kernels_seen import kernels_seen, unexpected
from warpdecode.bench.layers import Layers
from warpdecode.bench.layouts import label
from warpdecode.bench.machine import clocks
from warpdecode.bench.reference import reference, relative, sample
from warpdecode.bench.timers import CpuTimer, CudaTimer

_warned: set[str] = set()


def measure(
    shape, dtype_name, tokens_list, device, routing, kernels, *,
    repeats=None, peers=True, seed=0, parts=False, eager=False, profile=False, layouts=(),
):  # fmt: skip
    """Yields one row (a dict, ready for JSON) per number of tokens. device: "cpu" or "cuda"; ValueError for others.

    kernels: rows of the library's table to force and time, too. peers: names of `bench.peers`; True for all that can be
    used in this process, False for none. parts: each kernel alone, too. eager: wall times of eager calls, too. profile:
    record which CUDA kernels ran. layouts: names of `bench.layouts`, timed beside the standard one.
    """
    dtype = getattr(torch, dtype_name)
    timer = (CudaTimer if options.device(device) == "cuda" else CpuTimer)(repeats)
    left_out: dict[tuple[str, str], list[int]] = {}
    peer_names, fewer = _usable(peers, device), False
    try:
        with torch.no_grad():
            layers = Layers(shape, dtype, device, timer.cache_bytes, seed)
            for tokens in tokens_list:
                row = _row(layers, tokens, routing, timer, kernels, peer_names, parts, eager, profile, layouts)
                for what in row["left_out"].items():
                    left_out.setdefault(what, []).append(tokens)
                if row["repeats"] < timer.repeats and not fewer:
                    fewer = True
                    say(
                        f"{shape.name}, from T {tokens} on: {row['repeats']} repeats, not {timer.repeats}, which take "
                        f"over {timer.row_seconds:g} s; each row says how many it has"
                    )
                yield row
    finally:  # also where a later row does not fit
        for (name, why), at in left_out.items():
            say(f"{shape.name}, T {', '.join(map(str, at))}: {name} left out: {why}")


def _usable(names, device):
    if isinstance(names, bool):
        names = peers.chosen(None, device)[0] if names else []
    return [name for name in names if name != "vllm-invariant"]  # that one needs a process of its own: child.py


def _row(layers, tokens, routing, timer, kernels, peer_names, parts, eager, profile, layouts):
    shape, device = layers.shape, layers.device
    timer.rounds = {}  # gives back the memory of the last row's graphs
    inputs = layers.inputs(
        tokens, routing, lambda call_bytes: timer.calls(layers.copies, call_bytes, ours.flops(layers, tokens))
    )
    distinct = [layers.distinct(ids) for _, ids, _ in inputs]
    peer_candidates, left_out, failed = peers.candidates(peer_names, layers, inputs, eager=eager)
    found = _ours(layers, inputs, distinct, kernels, layouts, parts, failed) | peer_candidates
    errors, floor, not_run = _errors(layers, inputs[0], {"warpdecode": found["warpdecode"], **peer_candidates})
    failed.update(not_run)
    times = timer.time({name: candidate for name, candidate in found.items() if name not in failed})
    state = clocks(timer.rounds["warpdecode"]) if device == "cuda" else None
    failed.update(timer.failed)
    timed = {name: found[name] for name in times}
    row: dict = {
        "shape": shape.name, "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden,
        "intermediate": shape.intermediate, "activation": shape.activation, "dtype": str(layers.dtype).split(".")[-1],
        "device": device, "routing": routing, "seed": layers.seed, "tokens": tokens,
        "calls": len(inputs), "copies": layers.copies, "repeats": timer.taken,
        "distinct_bytes": round(sum(distinct) / len(distinct) * layers.expert_bytes),
        "gross_bytes": tokens * shape.top_k * layers.expert_bytes,
        "error": errors["warpdecode"], "rounding_floor": floor,
        "same_bits_alone": same_bits_alone(layers, inputs[0], found["warpdecode"].calls[0]()),
    }  # fmt: skip
    if device == "cuda":
        row["clocks"] = state
    if eager:
        row["eager_microseconds"] = timer.time_eager(
            {name: timed[name] for name in ("warpdecode", *kernels, *peer_candidates) if name in timed}
        )
        failed.update((f"{name}, eager", why) for name, why in timer.failed.items())
    if profile and device == "cuda":
        row["kernels_seen"], wrong = _seen(timed, timer.rounds)
        failed.update(wrong)
        for name in wrong:
            for figures in (times, row.get("eager_microseconds", {})):
                figures.pop(name, None)
    if "vllm" in times:
        row["vllm_config"] = peer_vllm.configuration(layers, tokens)
    row.update(
        microseconds=times,
        peers=[name for name in peer_candidates if name in times],
        layouts=[name for name in layouts if label(name) in times],
        peer_errors={name: errors[name] for name in peer_candidates if name in times},
        left_out=left_out, failed=failed,
    )  # fmt: skip
    row.update(derived(row, {name: found[name].flops for name in times}))
    for name, why in failed.items():
        say(f"{shape.name}, T {tokens}: {name} left out: {why}")
    return row


def _ours(layers, inputs, distinct, kernels, layouts, parts, failed):
    """The library's candidates and the ceilings. What of it could be done without and cannot be made is in failed."""
    sink = torch.empty(16, dtype=torch.uint8, device=layers.device)
    more = {name: (lambda name=name: {name: ours.layer(layers, inputs, name)}) for name in kernels}
    more |= {label(name): (lambda name=name: {label(name): ours.in_layout(layers, inputs, name)}) for name in layouts}
    if parts:  # each call keeps an intermediate: long calls may not have the room
        more["gate_up and down alone"] = lambda: ours.parts(layers, inputs)
    found = {"warpdecode": ours.layer(layers, inputs, None)}
    for name, make in more.items():
        try:
            found.update(make())
        except Exception as error:
            failed[name] = reason(error)
    found["read ceiling"] = ours.ceiling(layers, distinct, sink, split=False)
    found["two reads"] = ours.ceiling(layers, distinct, sink, split=True)
    return found


def _errors(layers, first_call, candidates):
    """Relative errors of a call's sampled tokens against float64, the error of rounding alone, and what failed."""
    x, ids, weights = first_call
    some = sample(len(x))
    expected = reference(x[some], ids[some], weights[some], layers.gate_up[0], layers.down[0], layers.shape.activation)
    errors, failed = {}, {}
    for name, candidate in candidates.items():
        try:
            errors[name] = relative(candidate.calls[0]()[some], expected)
        except Exception as error:
            if candidate.required:
                raise
            failed[name] = reason(error)
            continue
        if not (candidate.required or math.isfinite(errors[name])):
            failed[name] = "its output is not finite"
    return errors, relative(expected.to(layers.dtype), expected), failed


def same_bits_alone(layers, first_call, together: torch.Tensor) -> bool:
    """Whether a call's sampled tokens, each of them alone, have the bits that they have together."""
    x, ids, weights = first_call
    experts = warpdecode.Experts(layers.gate_up[0], layers.down[0], activation=layers.shape.activation)
    ones = [slice(token, token + 1) for token in sample(len(x))]
    alone = [experts(x[one], ids[one], weights[one]) for one in ones]
    return all(_same_bits(found, together[one]) for found, one in zip(alone, ones, strict=True))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # 0 and -0 are equal, and nan is not


def wrong(row: dict) -> str | None:
    """A sentence where a token's bits depend on its batch, or our output is further from float64's than its own
    rounding and sums in float32 explain."""
    if not row["same_bits_alone"]:
        return "our output is wrong: a token alone has other bits than in its batch"
    explained = 1.1 * row["rounding_floor"] + 2**-24 * (row["hidden"] + row["intermediate"]) ** 0.5
    if row["error"] <= explained:  # not where it is nan
        return None
    return f"our output is wrong: its error is {row['error']:.3g}, expected at most {explained:.3g}"


def derived(row: dict, flops: dict[str, float]) -> dict:
    """The quotients of a row's times: fractions of the ceilings, ratios to the peers and layouts, useful TFLOP/s."""
    medians = {name: time["median"] for name, time in row["microseconds"].items()}
    mine = medians["warpdecode"]
    return {
        "of_ceiling": medians["read ceiling"] / mine,
        "of_two_reads": medians["two reads"] / mine,
        "ratios": {name: medians[name] / mine for name in row["peers"]},
        "layout_ratios": {name: mine / medians[label(name)] for name in row.get("layouts", ())},
        "tflops": {name: flops[name] / medians[name] * 1e-6 for name in medians if flops.get(name)},
    }


def _seen(timed, rounds):
    """The kernels of each candidate's round, of the graph that was timed where it is one (None where the profiler sees
    none), and which candidates ran wrong ones."""
    why = "torch's profiler sees no kernels"
    seen: dict[str, list[str]] = {}
    for _ in range(2):  # a recording may lose events: what either has, ran
        try:
            found = kernels_seen(rounds) or {}
        except Exception as error:
            found, why = {}, reason(error)
        seen |= {name: list(dict.fromkeys([*seen.get(name, ()), *kernels])) for name, kernels in found.items()}
        wrong = unexpected(seen)
        if seen and not wrong:
            return seen, {}
    for name, sentence in wrong.items():
        if timed[name].required:
            raise RuntimeError(f"{name}: {sentence}")
    if not seen and "profiler" not in _warned:
        _warned.add("profiler")
        say(f"kernels_seen is null: {why}")
    return seen or None, wrong
