"""Tokens per second of `generate()`, stock and patched, on a model of a real size with random weights.

    python -m warpdecode.bench.end_to_end --batch 1,8 --new-tokens 64 --output results.jsonl

The model is built from Qwen3-30B-A3B's configuration on the device; no checkpoint is needed, because neither the time
of a decode step nor the rounding of its logits depends on what the weights say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time

import torch

import warpdecode.hf
from warpdecode.bench import environment

REPEATS = 7
QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def build(layers: int, device: str):
    """The model in bfloat16, random weights, made on the device."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(num_hidden_layers=layers, **QWEN3_30B_A3B)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tokens_per_second(model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, torch.Tensor]:
    """One greedy generation of exactly new_tokens per row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    torch.cuda.synchronize()
    return prompt.shape[0] * new_tokens / (time.perf_counter() - start), out


def measure(model, batch: int, new_tokens: int, prompt_tokens: int) -> dict:
    """Stock and patched, both speeds and how far the logits of the same text are apart."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (batch, prompt_tokens), device=model.device)
    speeds = {"stock": [], "patched": []}
    for repeat in range(REPEATS + 1):  # in turn, because the host's speed drifts; the first round warms up
        for name, scope in (
            ("stock", contextlib.nullcontext()),
            ("patched", warpdecode.hf.patched(model, strict=True)),
        ):
            with scope, torch.no_grad():
                speed, text = tokens_per_second(model, prompt, new_tokens)
                if repeat:
                    speeds[name].append(speed)
                elif name == "stock":
                    stock_text, stock_logits = text, model(text, logits_to_keep=8).logits.float()
                else:
                    patched_text, patched_logits = text, model(stock_text, logits_to_keep=8).logits.float()
    difference = (stock_logits - patched_logits).abs()
    stock, patched = (statistics.median(values) for values in speeds.values())
    return {
        "batch": batch, "new_tokens": new_tokens, "stock_tokens_per_second": stock,
        "patched_tokens_per_second": patched, "speedup": patched / stock, "tokens_per_second": speeds,
        "largest_logit_difference": difference.max().item(), "logit_standard_deviation": stock_logits.std().item(),
        "equal_tokens": (stock_text == patched_text)[:, prompt_tokens:].float().mean().item(),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output", default=None, help="append the rows to this file as JSON lines")
    args = parser.parse_args()
    model = build(args.layers, "cuda")
    print(warpdecode.hf.explain(model))
    for batch in args.batch.split(","):
        row = measure(model, int(batch), args.new_tokens, args.prompt_tokens)
        row = {"model": f"qwen3-30b-a3b, {args.layers} layers, random", **row, "environment": environment("cuda")}
        print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
