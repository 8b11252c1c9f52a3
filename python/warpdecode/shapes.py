"""Shapes of real MoE layers: one list for tests, benchmarks and notebooks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer's experts: E experts, K of them per token, hidden size H, intermediate size I."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu"

    def __str__(self):
        return f"{self.name} (E{self.experts} K{self.top_k} H{self.hidden} I{self.intermediate})"

    def bytes_per_expert(self, itemsize: int = 2) -> int:
        """Bytes of one expert's three projections."""
        return 3 * self.hidden * self.intermediate * itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("gemma4-26b-a4b", 128, 8, 2816, 704, "gelu_tanh"),
        Shape("qwen3.5-35b-a3b", 256, 8, 2048, 512),
        Shape("olmoe-1b-7b", 64, 8, 2048, 1024),
        Shape("glm-4.5-air", 128, 8, 4096, 1408),
        Shape("phi-3.5-moe", 16, 2, 4096, 6400),
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("qwen3-next", 512, 10, 2048, 512),
        Shape("deepseek-v3", 256, 8, 7168, 2048),
        Shape("granite-3b", 40, 8, 1536, 512),
        Shape("ernie4.5-21b", 64, 6, 2560, 1536),
        Shape("nemotron-h-like", 128, 6, 2688, 1856),
        Shape("jamba-mini", 16, 2, 4096, 14336),
        Shape("gpt-oss-20b", 32, 4, 2880, 2880),
        Shape("gpt-oss-120b", 128, 4, 2880, 2880),
        Shape("llama-4-scout", 16, 1, 5120, 8192),
    )
}

# The list that figures are published for: small and large experts, few and many of them.
NINE = tuple(list(SHAPES)[:9])

_MOST_RANDOM_BYTES = 12 * 10**9  # of a layer in two-byte weights, so that two copies fit beside what the peers need

# What released models have: every K, and every I of a whole layer.
_TOP_K = (1, 2, 4, 5, 6, 8, 10, 12)
_INTERMEDIATE = (
    512, 704, 768, 1024, 1280, 1408, 1536, 1792, 1856, 2048, 2560, 2880, 3072, 3584, 6400, 8192, 10752, 14336, 16384,
)  # fmt: skip
_RANKS = (1, 1, 1, 1, 2, 4, 8)  # three of seven layers are a rank's part under tensor parallelism


def random_shapes(count: int, seed: int) -> list[Shape]:
    """Shapes drawn from the ranges of real models, odd sizes (2880, 1856, ...) among them; the same for a seed."""
    draw, shapes = random.Random(seed), {}
    while len(shapes) < count:
        experts = round(2 ** draw.uniform(2.81, 9))  # 7 to 512
        if draw.random() < 0.7:
            experts = 1 << round(math.log2(experts))
        top_k = draw.choice([k for k in _TOP_K if 2 * k <= experts])
        hidden = 64 * draw.randint(16, 128)
        intermediate = draw.choice(_INTERMEDIATE) // draw.choice(_RANKS)
        name = f"random-E{experts}-K{top_k}-H{hidden}-I{intermediate}"
        shape = Shape(name, experts, top_k, hidden, intermediate)
        if experts * shape.bytes_per_expert() <= _MOST_RANDOM_BYTES:
            shapes[name] = shape
    return list(shapes.values())


def named_shapes(text: str, seed: int = 0) -> list[Shape]:
    """The shapes of a comma-separated list of names, "nine", "all" and "random:N". Raises ValueError for others."""
    found: dict[str, Shape] = {}
    unknown = []
    for name in map(str.strip, text.split(",")):
        kind, _, count = name.partition(":")
        if name in SHAPES:
            shapes = [SHAPES[name]]
        elif name in ("all", "nine"):
            shapes = [SHAPES[each] for each in (SHAPES if name == "all" else NINE)]
        elif kind == "random" and count.isdecimal() and int(count) > 0:
            shapes = random_shapes(int(count), seed)
        else:
            unknown.append(name)
            continue
        found.update((shape.name, shape) for shape in shapes)
    if unknown:
        raise ValueError(f"was {', '.join(unknown)}, expected {', '.join(SHAPES)}, nine, all or random:N")
    return list(found.values())
