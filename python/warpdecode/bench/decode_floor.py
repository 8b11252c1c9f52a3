"""How many distinct experts a decode step touches, and how long reading them takes: the floor of any MoE kernel."""

from __future__ import annotations

import torch

from warpdecode.bench.candidates import Candidate, read_memory
from warpdecode.bench.timers import CpuTimer, CudaTimer
from warpdecode.bench.variants import experts_of

LAST = 8  # positions at the end of a text that are looked at


@torch.no_grad()
def logits_and_distinct(model: torch.nn.Module, text: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The logits of a text's last positions in float32, and how many distinct experts the rows of one position name,
    averaged over layers and positions: as many as a decode step of this batch reads."""
    batch, counts, hooks = len(text), [], []

    def look(_, args, kwargs):
        ids = next(tensor for tensor in (*args, *kwargs.values()) if not tensor.is_floating_point())
        by_position = ids.reshape(batch, -1, ids.shape[-1])[:, -LAST:].transpose(0, 1)
        counts.extend(len(torch.unique(position)) for position in by_position)

    try:
        hooks.extend(experts.register_forward_pre_hook(look, with_kwargs=True) for experts in experts_of(model))
        logits = model(text, logits_to_keep=LAST, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, sum(counts) / len(counts)


@torch.no_grad()
def logits_of_another_path(model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """The logits again, by another of transformers' own paths than the model's: how far one rounding leads from another
    in such a model, whoever's. Random weights can make that far."""
    own = experts_of(model)[0].config._experts_implementation
    model.set_experts_implementation("grouped_mm" if own == "eager" else "eager")
    try:
        return model(text, logits_to_keep=LAST, use_cache=False).logits.float()
    finally:
        model.set_experts_implementation(own)


def read_milliseconds(model: torch.nn.Module, distinct: float) -> float:
    """Milliseconds of reading that many experts of each layer once: two reads a layer, one behind the other."""
    weights = [w.detach() for experts in experts_of(model) for w in (experts.gate_up_proj, experts.down_proj)]
    sink = torch.empty(16, dtype=torch.uint8, device=weights[0].device)
    reads = [read_memory(w[: round(distinct)], sink) for w in weights]
    timer = CudaTimer(None) if weights[0].is_cuda else CpuTimer(3)
    times = timer.time({"read": Candidate([lambda: [read() for read in reads]], required=True)})
    return times["read"]["median"] * 1e-3
