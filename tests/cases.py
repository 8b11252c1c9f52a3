"""Random layers and routings for the tests, and the bounds that follow from the arithmetic."""

from dataclasses import dataclass

import numpy as np
import torch

import reference
from warpdecode.shapes import SHAPES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Real layers (E, K, H, I); tests cut E where they need not hold them all: the kernels' paths depend on H, I, K and the
# routes, and only the number of blocks on E.
MODEL_SHAPES = {s.name: (s.experts, s.top_k, s.hidden, s.intermediate) for s in SHAPES.values()}


@dataclass
class Layer:
    """Weights of one layer, scaled so that gate and up are of order 1, where the activations bend."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @property
    def sizes(self):
        """(E, H, I)"""
        return self.down.shape


def make_layer(experts, hidden, intermediate, dtype, device="cpu", seed=0):
    """A fresh random layer. seed: tests that draw through hypothesis pass their own."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape, scale):
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return Layer(
        draw(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        draw(experts, hidden, intermediate, scale=intermediate**-0.5),
    )


def make_tokens(layer, tokens, top_k, seed=0, routing="uniform", id_dtype=torch.int64, weight_dtype=torch.float32):
    """(hidden_states, topk_ids, topk_weights) for a layer."""
    experts, hidden, _ = layer.sizes
    device, dtype = layer.down.device, layer.down.dtype
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    if routing == "uniform":  # distinct experts, as a router gives them
        ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
        if ids.shape[1] < top_k:
            ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    elif routing == "zipf":
        odds = 1.0 / torch.arange(1, experts + 1, dtype=torch.float64)
        ids = torch.multinomial(odds.expand(max(tokens, 1), -1), top_k, replacement=True, generator=generator)[:tokens]
    elif routing == "one":  # every route to one expert: duplicated ids in every token
        ids = torch.full((tokens, top_k), int(torch.randint(0, experts, (1,), generator=generator)))
    elif routing == "out of range":
        ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
        if tokens:
            ids[0] = experts  # a token with no expert at all
    else:
        raise ValueError(routing)
    weights = torch.rand(tokens, top_k, generator=generator).to(weight_dtype)
    weights[(ids < 0) | (ids >= experts)] = float("nan")  # must not be looked at
    return x.to(device), ids.to(id_dtype).to(device), weights.to(device)


def exact(layer, x, ids, weights, activation="silu"):
    """The reference's output as a float64 tensor on the CPU."""
    weights64, gate_up, down, x64 = (t.float().cpu().numpy() for t in (weights, layer.gate_up, layer.down, x))
    return torch.from_numpy(reference.moe(x64, ids.cpu().numpy(), weights64, gate_up, down, activation))


def relative_error(found, expected):
    """||found - expected|| / ||expected||, inf for anything that is not a number."""
    norm = expected.norm().item()
    error = (found.double().cpu() - expected).norm().item()
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def rounding_floor(expected, dtype):
    """The relative error of the exact result rounded to the output's dtype: nothing can be closer."""
    return relative_error(expected.to(dtype), expected)


def error_bound(expected, dtype):
    """Bound of the relative error: the output's rounding, the intermediate's, and the sums' in FP32.

    Rounding the output and 16 bits of the intermediate are independent, so they add as squares. A sum of n products in
    FP32 errs by about sqrt(n) * 2^-24 of the typical term (random signs), tensor cores truncate: 2^-22. Terms of either
    sign leave the typical sum at sqrt(n) times a term, so the relative error of a dot product is about 2^-22; three
    nested roundings of that kind, with a factor 4 for the activation's slope and the slots' cancellation.
    """
    floor = rounding_floor(expected, dtype)
    intermediate_error = 2.0**-17 if dtype != torch.float32 else 0.0
    sums = 4 * 3 * 2.0**-22
    return 1.02 * float(np.hypot(floor, intermediate_error)) + sums


def poison(tensor):
    """Fills with NaN bytes (0xFF), so that an element that is not written, or a workspace that is read, shows."""
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor
