"""The order of a run: a shape in the child first, then in this process, so that never both hold its weights."""

from __future__ import annotations

from collections.abc import Iterator

from warpdecode.bench.child import INVARIANT, INVARIANT_NAME, Child, ChildFailed, free_memory, merge
from warpdecode.bench.failures import out_of_memory, reason, say
from warpdecode.bench.measure import measure, wrong
from warpdecode.shapes import Shape


class Runner:
    """Measures shapes one after the other. complete: False once something could not be measured or was wrong.

    missing: peers that were asked for and cannot be used, and why.
    """

    def __init__(
        self, device: str, kernels: list[str], peers: list[str], missing: dict[str, str], layouts: list[str], args
    ):
        self.complete = True
        self._device, self._kernels, self._layouts, self._args = device, kernels, layouts, args
        self._peers = [name for name in peers if name != "vllm-invariant"]
        self._missing = {INVARIANT_NAME if name == "vllm-invariant" else name: why for name, why in missing.items()}
        self._child = Child(INVARIANT) if "vllm-invariant" in peers else None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_) -> None:
        if self._child:
            self._child.close()

    def rows(self, shape: Shape, dtype: str, routing: str, tokens: list[int]) -> Iterator[dict]:
        """The rows of one shape, dtype and routing, with the child's peer merged in."""
        args, options = self._args, self._options()
        apart, why = self._rows_apart(shape, dtype, routing, tokens, options)
        try:
            for row in measure(
                shape, dtype, tokens, self._device, routing, self._kernels,
                peers=self._peers, parts=not args.no_parts, layouts=self._layouts, **options,
            ):  # fmt: skip
                self._finish(row, apart.get(row["tokens"]), why)
                yield row
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.complete = False  # the other shapes may fit
            say(f"{shape.name}, {dtype}, {routing}: the remaining rows are left out: {reason(error)}")
        free_memory()

    def _finish(self, row: dict, apart: dict | None, why: str | None) -> None:
        """Adds what this row has from elsewhere, and looks at whether it is all there."""
        failed, place = row["failed"], f"{row['shape']}, T {row['tokens']}"
        failed.update(self._missing)
        if apart:
            merge(row, apart, "vllm", INVARIANT_NAME)
        elif why:
            failed[INVARIANT_NAME] = why
        if INVARIANT_NAME in failed:
            say(f"{place}: {INVARIANT_NAME} left out: {failed[INVARIANT_NAME]}")
        what_is_wrong = wrong(row)
        if what_is_wrong:
            say(f"{place}: {what_is_wrong}")
        self.complete &= not failed and not what_is_wrong

    def _options(self) -> dict:
        args = self._args
        return {
            "repeats": args.repeats, "seed": args.seed, "eager": args.eager, "profile": not args.no_profile,
        }  # fmt: skip

    def _rows_apart(self, shape, dtype, routing, tokens, options) -> tuple[dict[int, dict], str | None]:
        """The child's rows by number of tokens, and why some or all are missing."""
        if self._child is None:
            return {}, None
        free_memory()
        try:
            return self._child.measure(
                shape, dtype, tokens, device=self._device, routing=routing, peers=["vllm"], **options
            )
        except ChildFailed as error:
            if not error.final:
                return {}, str(error)
            self._child.close()
            self._child = None
            if self._args.peers is None:  # nobody asked for a peer that cannot be imported
                say(f"{INVARIANT_NAME} left out: {error}")
            else:
                self._missing[INVARIANT_NAME] = str(error)
            return {}, None
