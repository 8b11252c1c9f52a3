"""The order of a run: a shape in the child first, then in this process, so that never both hold its weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from warpdecode.bench.child import INVARIANT, INVARIANT_NAME, Child, ChildFailed, free_memory, merge
from warpdecode.bench.measure import measure
from warpdecode.bench.peers import say
from warpdecode.bench.timers import reason
from warpdecode.shapes import Shape


class Runner:
    """Measures shapes one after the other. complete: False once a row of this process could not be measured."""

    def __init__(self, device: str, kernels: list[str], peers: list[str], layouts: list[str], args):
        self.complete = True
        self._device, self._kernels, self._layouts, self._args = device, kernels, layouts, args
        self._peers = [name for name in peers if name != "vllm-invariant"]
        self._child = Child(INVARIANT) if "vllm-invariant" in peers else None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_) -> None:
        if self._child:
            self._child.close()

    def rows(self, shape: Shape, dtype: str, tokens: list[int]) -> Iterator[dict]:
        """The rows of one shape and dtype, with the child's peer merged in."""
        args, options = self._args, self._options()
        apart = self._rows_apart(shape, dtype, tokens, options)
        try:
            for row in measure(
                shape, dtype, tokens, self._device, args.routing, self._kernels,
                peers=self._peers, parts=not args.no_parts, layouts=self._layouts, **options,
            ):  # fmt: skip
                if row["tokens"] in apart:
                    merge(row, apart[row["tokens"]], "vllm", INVARIANT_NAME)
                    if INVARIANT_NAME in row["failed"]:
                        say(f"{shape.name}, T {row['tokens']}: {INVARIANT_NAME} left out, see above")
                yield row
        except torch.OutOfMemoryError as error:  # the other shapes may fit
            self.complete = False
            say(f"{shape.name}, {dtype}: the remaining rows are left out: {reason(error)}")
        free_memory()

    def _options(self) -> dict:
        args = self._args
        return {
            "repeats": args.repeats, "seed": args.seed, "eager": args.eager, "profile": not args.no_profile,
        }  # fmt: skip

    def _rows_apart(self, shape, dtype, tokens, options) -> dict[int, dict]:
        if self._child is None:
            return {}
        free_memory()
        try:
            return self._child.measure(
                shape, dtype, tokens, device=self._device, routing=self._args.routing, peers=["vllm"], **options
            )
        except ChildFailed as error:
            say(f"{shape.name}, {dtype}: {INVARIANT_NAME} left out: {error}")
            if error.final:
                self._child.close()
                self._child = None
            return {}
