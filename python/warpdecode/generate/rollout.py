"""Generating the samples: a model, a fixed partition of the samples into batches, one ``model.generate`` a batch."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator

import torch
import transformers

from . import GenerateError
from .sampling import Draw


def load_model(name: str, dtype: str, device: torch.device) -> transformers.PreTrainedModel:
    """Load a causal language model for generation with nothing but its end-of-sequence and padding tokens set.

    Raises:
        GenerateError: it cannot be loaded, does not fit, or its files lack weights.
    """
    # With accelerate the weights go to the GPU one by one; without it the whole model has to fit into the host first.
    direct = device.type == "cuda" and importlib.util.find_spec("accelerate") is not None
    placement = {"device_map": {"": device}} if direct else {}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **placement
        )
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise GenerateError(f"the model {name} does not fit into the memory of {device}: {error}") from None
    except Exception as error:  # a broken file is found by whichever package reads it, with an exception of its own
        raise GenerateError(f"the model {name} cannot be loaded: {error}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise GenerateError(f"the files of the model {name} lack the weights {named}; all were expected")
    own = model.generation_config
    # A checkpoint may bring a repetition penalty, suppressed tokens and more, all of which generate() would apply
    # before the draw: the logprobs would no longer be the model's.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise GenerateError(f"the tokenizer of {name} cannot be loaded: {error}") from None


class Rollout:
    """What is to be sampled, in batches.

    Sample ``n`` of the run is sample ``n % samples`` of prompt ``n // samples``, and batch ``b`` holds the samples from
    ``b * batch_size`` on, whatever was written before: the partition depends on the settings alone.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        prompts: list[str],
        *,
        samples: int,
        batch_size: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        self.tokenizer, self.prompts, self.samples, self.batch_size = tokenizer, prompts, samples, batch_size
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self.tokens = 0
        """How many tokens were sampled in all calls of ``batches``."""
        self.seconds = 0.0
        """How long that took."""

    def __len__(self) -> int:
        return len(self.prompts) * self.samples

    def key(self, n: int) -> tuple[int, int]:
        """Return the (prompt index, sample index) of sample ``n``."""
        return divmod(n, self.samples)

    def batches(self, model: transformers.PreTrainedModel, done: int = 0) -> Iterator[list[dict]]:
        """Yield the rows of each batch, beginning after the first ``done`` samples.

        A batch that is partly among them is generated as a whole, and its missing rows are yielded.
        """
        for start in range(done - done % self.batch_size, len(self), self.batch_size):
            began = time.perf_counter()
            rows = self._batch(model, range(start, min(start + self.batch_size, len(self))))
            self.seconds += time.perf_counter() - began
            self.tokens += sum(len(row["token_ids"]) for row in rows)
            yield rows[max(done - start, 0) :]

    def check_prompts(self) -> None:
        """Raise ``GenerateError`` for a prompt that has no tokens."""
        for prompt, text in enumerate(self.prompts):
            # Only blank ones can be without a token, and tokenizing all of them takes a while; the first for a folder
            # without a tokenizer's files, of which transformers makes a tokenizer that knows no token.
            if prompt == 0 or not text.strip():
                self.encoded(prompt)

    def reset_clock(self) -> None:
        """Count tokens and seconds from zero."""
        self.tokens, self.seconds = 0, 0.0

    def warm_up(self, model: transformers.PreTrainedModel) -> None:
        """Run a few steps of the first batch, so that loading kernels and growing pools is not timed.

        The whole batch, because libraries choose and load kernels by its size.
        """
        first = range(min(self.batch_size, len(self)))
        self._generate(model, [self.key(n) for n in first], max_new_tokens=min(4, self.max_new_tokens))

    def _batch(self, model: transformers.PreTrainedModel, numbers: range) -> list[dict]:
        keys = [self.key(n) for n in numbers]
        sampled, logprobs = self._generate(model, keys, self.max_new_tokens)
        rows = []
        for (prompt, sample), ids, logs in zip(keys, sampled, logprobs, strict=True):
            end = self._end(model, ids)
            for step, log in enumerate(logs[:end]):
                if not math.isfinite(log):
                    raise GenerateError(
                        f"the model's logits are not finite at token {step} of sample {sample} of prompt {prompt} "
                        f"({self.prompts[prompt]!r}); the samples before it are kept"
                    )
            rows.append(
                {
                    "prompt": self.prompts[prompt],
                    "sample": sample,
                    "text": self.tokenizer.decode(ids[:end], skip_special_tokens=True),
                    "token_ids": ids[:end],
                    # The model's logits have at most float32's precision, for which nine digits are enough.
                    "logprobs": [float(f"{log:.9g}") for log in logs[:end]],
                }
            )
        return rows

    def _end(self, model: transformers.PreTrainedModel, ids: list[int]) -> int:
        """Return the length of a sample: up to and including the first end-of-sequence token."""
        eos = self._eos(model)
        return next((step + 1 for step, token in enumerate(ids) if token in eos), len(ids))

    def _eos(self, model: transformers.PreTrainedModel) -> list[int]:
        eos = model.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return [] if eos is None else eos if isinstance(eos, list) else [eos]

    def _generate(
        self, model: transformers.PreTrainedModel, keys: list[tuple[int, int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample one continuation per key; return tokens and logprobs, including what follows a sample's end."""
        eos = self._eos(model)
        pad = model.generation_config.pad_token_id
        pad = pad if pad is not None else eos[0] if eos else 0  # any id does: it is masked, or beyond a sample's end
        encoded = [self.encoded(prompt) for prompt, _ in keys]
        width = max(map(len, encoded))
        # On the left, so that every sequence's next token is in the same column.
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        draw = Draw(keys, self.seed, self.temperature, self.top_p)
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos or None, pad_token_id=pad
            ),
            logits_processor=transformers.LogitsProcessorList([draw]),
        )
        return output[:, width:].tolist(), draw.logprobs()

    def encoded(self, prompt: int) -> list[int]:
        """Return a prompt's tokens, with the special tokens that the tokenizer adds by itself."""
        ids = self.tokenizer(self.prompts[prompt])["input_ids"]
        if not ids:
            raise GenerateError(
                f"prompt {prompt} ({self.prompts[prompt]!r}) has no tokens; at least one was expected "
                f"(the tokenizer of {self.tokenizer.name_or_path} knows {len(self.tokenizer)}: are its files there?)"
            )
        return ids
