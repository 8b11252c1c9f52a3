"""Shapes of real MoE layers: one list for tests, benchmarks and notebooks."""

from __future__ import annotations

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
    )
}
