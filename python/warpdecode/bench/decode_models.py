"""The order of a run of end_to_end: models, modes, batches. What cannot be run costs its own rows alone."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch

from warpdecode.bench.decode_rounds import measure
from warpdecode.bench.decode_settings import Settings
from warpdecode.bench.failures import reason
from warpdecode.bench.random_models import build
from warpdecode.bench.variant_names import DEFAULT


class Models:
    """Measures models one after the other. complete: False once one could not be built, or a row lacks a figure."""

    def __init__(self, args: argparse.Namespace, settings: Settings, sizes: dict, say: Callable[[str], None]):
        """sizes: what of a model's configuration is to differ."""
        self.complete = True
        self._args, self._settings, self._say = args, settings, say
        self._sizes = sizes | ({} if args.layers is None else {"num_hidden_layers": args.layers})
        self._start = time.perf_counter()

    def rows(self) -> Iterator[dict]:
        """The rows of all models, modes and batches."""
        for name in self._args.models:
            try:
                model = build(name, self._args.device, **self._sizes)
            except Exception as error:  # the other models may fit, or be known to this transformers
                self.complete = False
                self._say(f"{name} left out: {reason(error)}")
            else:
                yield from self._rows_of(name, model)
                del model
            torch._dynamo.reset()  # compiled steps hold the weights
            gc.collect()
            if self._args.device == "cuda":
                torch.cuda.empty_cache()

    def _rows_of(self, name: str, model: torch.nn.Module) -> Iterator[dict]:
        common = {"model": name, "layers": model.config.num_hidden_layers, "device": self._args.device}
        for mode in self._args.modes:
            variants = self._args.variants or DEFAULT[mode]
            for batch in self._args.batch:
                where = f"{name}, {mode}, batch {batch}"
                self._say(f"{where} (after {time.perf_counter() - self._start:.0f} s)")
                say = lambda text, where=where: self._say(f"{where}: {text}")  # noqa: E731
                for row in measure(model, variants, mode, batch, self._settings, say):
                    self.complete &= not {"failed", "not_looked_at"} & set(row)
                    yield {**common, **row}
