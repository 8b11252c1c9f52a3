"""Trains the demo model from nothing on a CPU, and measures it.

    python -m warpdecode.demo.train --output DIR      train, write the model folder, measure it
    python -m warpdecode.demo.train --evaluate        measure the shipped model

The shipped model is the default run (1200 steps, seed 0, one thread), which took 12 minutes on a shared machine.
Repeated with the same torch version on the same kind of CPU it gave the same file, byte for byte; elsewhere sums are
rounded in another order and the weights differ.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from . import load, model_path
from .evaluate import MAX_NEW_TOKENS, expert_load, wrong_answers
from .task import CHARACTERS, distinct_held_out, prompt_text, prompts_jsonl, sample_pairs, worked_answer

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
POSITIONS = 256  # far more than a sum takes, for whoever decodes on past its end
STEPS = 1200
BATCH = 128
PEAK_LR = 3e-3
WARMUP_STEPS = 100
BALANCE = 0.01  # weight of the router's balance loss
MEASURED_PAIRS = 2000  # held-out sums for the final measure
WATCHED_PAIRS = 250  # and for the line printed every WATCH_EVERY steps
WATCH_EVERY = 250
IGNORED = -100  # the label cross_entropy leaves out


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the character tokenizer: one token a character, no merges, nothing added to a text."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()  # without it, decoding puts a space between the characters
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=POSITIONS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return an untrained model of the demo's shape; every layer is a mixture of experts."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,  # the width of a dense layer's MLP; no layer is dense
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        router_aux_loss_coef=BALANCE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(input_ids, labels)`` for ever, from training pairs only.

    Rows are padded on the right, where causal attention keeps the padding out of every real position. Only the answer
    is a label: the digits of the question are random, and predicting them cannot be learnt.
    """
    ids = tokenizer.get_vocab()
    pairs = sample_pairs(rng, held_out=False)
    while True:
        rows, starts = [], []
        for a, b in islice(pairs, BATCH):
            prompt = prompt_text(a, b)
            rows.append([*(ids[c] for c in prompt + worked_answer(a, b)), tokenizer.eos_token_id])
            starts.append(len(prompt))
        inputs = torch.full((BATCH, max(map(len, rows))), tokenizer.pad_token_id)
        labels = torch.full_like(inputs, IGNORED)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            inputs[i, : len(row)] = torch.tensor(row)
            labels[i, start : len(row)] = inputs[i, start : len(row)]
        yield inputs, labels


def losses(model: Qwen3MoeForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the answer's cross-entropy and the router's balance loss (1.0 where every expert gets its share).

    transformers' own auxiliary loss adds the layers up before it compares the experts, so that an expert may idle in
    one layer if it works in another; here each layer is balanced for itself.
    """
    mask = (inputs != model.config.pad_token_id).long()
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    answer = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    layers = [load_balancing_loss_func((layer,), experts, top_k, mask) / top_k for layer in output.router_logits]
    return answer, torch.stack(layers).mean()


def schedule(step: int, steps: int) -> float:
    """Return the learning rate at ``step`` as a share of its peak: a short rise, level, and a linear fall to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0, 2.0 * (steps - step) / steps)


def train(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, out: Console) -> None:
    """Train the model in place, in fp32."""
    # On a CPU, the grouped product is a little faster than the loop over the experts, and leaves the same gradients.
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    source = batches(tokenizer, random.Random(seed))
    watched = distinct_held_out(WATCHED_PAIRS, seed=seed)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}"), console=out) as progress:
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            answer, balance = losses(model, *next(source))
            (answer + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            progress.update(task, advance=1, description=f"loss {answer.item():.4f}")
            if step % WATCH_EVERY == 0 or step == steps:
                wrong = wrong_answers(model.eval(), tokenizer, watched)
                model.train()
                share = 1 - len(wrong) / len(watched)
                out.print(f"step {step}: loss {answer.item():.5f}, balance {balance.item():.3f}, held-out {share:.1%}")
    model.eval()


def report(folder: Path, count: int, out: Console) -> None:
    """Load the folder as a user would, and print its held-out accuracy by dtype and its experts' load by layer."""
    pairs = distinct_held_out(count, seed=7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = load(dtype, folder=folder)
        start = time.perf_counter()
        wrong = wrong_answers(model, tokenizer, pairs)
        took = time.perf_counter() - start
        name = str(dtype).removeprefix("torch.")
        right = count - len(wrong)
        out.print(f"{name}: {right} of {count} held-out sums right ({right / count:.2%}), {took:.0f} s")
        for prompt, text in wrong[:5]:
            out.print(f"  wrong: {prompt}{text}", highlight=False)
    model, tokenizer = load(torch.float32, folder=folder)
    texts = [prompt_text(a, b) + worked_answer(a, b) for a, b in pairs[:500]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for index, shares in enumerate(expert_load(model, batch["input_ids"], batch["attention_mask"])):
        low, high, even = shares.min(), shares.max(), 1 / len(shares)
        out.print(f"layer {index}: experts' load from {low:.1%} to {high:.1%} (even: {even:.1%})")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(prog="python -m warpdecode.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder the trained model is written to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (the weights depend on it)")
    parser.add_argument("--prompts", type=Path, help="also write the file of held-out prompts here")
    parser.add_argument("--evaluate", action="store_true", help="only measure: --output's model, or the shipped one")
    parser.add_argument("--pairs", type=int, default=MEASURED_PAIRS, help="held-out sums to measure with")
    options = parser.parse_args(arguments)
    if options.output is None and not options.evaluate and options.prompts is None:
        parser.error("nothing to do: give --output, --prompts or --evaluate")

    out = Console()
    torch.set_num_threads(options.threads)
    if options.prompts is not None:
        options.prompts.write_text(prompts_jsonl(), encoding="utf-8")
    if options.output is not None and not options.evaluate:
        torch.manual_seed(options.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        out.print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        start = time.perf_counter()
        train(model, tokenizer, options.steps, options.seed, out)
        out.print(f"trained in {time.perf_counter() - start:.0f} s on {options.threads} threads")
        # Halving the file costs the sums nothing, as report() shows on what was written.
        model.to(torch.bfloat16).save_pretrained(options.output)
        build_tokenizer().save_pretrained(options.output)  # a used one would save its last batch's padding with it
    if options.output is not None or options.evaluate:
        report(options.output or model_path(), options.pairs, out)


if __name__ == "__main__":
    main()
