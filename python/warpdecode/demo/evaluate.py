"""Measures the demo model: how many held-out sums it gets right, and how evenly its experts are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .task import is_correct, prompt_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 40
"""Enough for the longest answer, 999+999, which takes 34 tokens with its end."""


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int = 250
) -> list[str]:
    """Answer every prompt greedily, in left-padded batches, and return the texts without the prompts."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]]
) -> list[tuple[str, str]]:
    """Return the prompts the model fails, each with what it wrote."""
    prompts = [prompt_text(a, b) for a, b in pairs]
    texts = generate_texts(model, tokenizer, prompts)
    return [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if not is_correct(prompt, text)]


def expert_load(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return each expert's share of its layer's routed tokens, shape ``[layers, experts]``; padding is not counted."""
    import torch

    with torch.no_grad():
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True, use_cache=False
        ).router_logits
    real = attention_mask.reshape(-1).bool()
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    shares = []
    for layer in logits:
        chosen = layer.float()[real].topk(top_k, dim=-1).indices
        shares.append(torch.bincount(chosen.reshape(-1), minlength=experts).float() / chosen.numel())
    return torch.stack(shares)
