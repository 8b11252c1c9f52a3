"""The experts that `generate()` is timed with, by name; without torch, for the command's --help. See variants.py."""

from __future__ import annotations

# generate() replaces the name grouped_mm by batched_mm for its decode steps on a GPU: under another name it stays.
KEPT = "warpdecode_bench_grouped_mm"
NULL = "warpdecode_bench_null"
READ = "warpdecode_bench_read"

# What a variant's model is told to use.
ASKED = {
    "stock": "grouped_mm",  # transformers' default; generate() decides what its decode steps run
    "eager": "eager",
    "batched_mm": "batched_mm",
    "grouped_mm": KEPT,
    "patched": "grouped_mm",
    "null": NULL,
    "read": READ,
}
NAMES = tuple(ASKED)
STOCK = ("stock", "eager", "batched_mm", "grouped_mm")
# The experts' loop over what the host has read cannot be compiled in one piece, so a static cache leaves it out.
DEFAULT = {"static": ("stock", "patched", "null"), "eager": ("stock", "eager", "grouped_mm", "patched", "null")}
