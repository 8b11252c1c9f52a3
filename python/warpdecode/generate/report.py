"""What ``generate`` says at its end: speeds, and with ``--compare`` whether both ways gave the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .rollout import Rollout


@dataclass
class Side:
    """One way of running the model: its speed, and how many samples are right where that can be told."""

    name: str
    tokens: int = 0
    seconds: float = 0.0
    right: int = 0


class Report:
    """Collects what is printed.

    Args:
        is_right: tells from a prompt and a text whether the text is right; None where nobody knows.
    """

    def __init__(self, is_right: Callable[[str, str], bool] | None = None) -> None:
        self._is_right = is_right
        self._warpdecode, self._stock = Side("warpdecode"), Side("transformers alone")
        self._samples = self._compared = self._identical = 0
        self._first_difference: str | None = None

    def _judge(self, side: Side, row: dict) -> None:
        if self._is_right is not None:
            side.right += self._is_right(row["prompt"], row["text"])

    def add_warpdecode(self, rollout: Rollout, rows: Iterable[dict]) -> None:
        """Take the clock of the patched run and the rows of the finished file, those of earlier calls included."""
        self._warpdecode.tokens, self._warpdecode.seconds = rollout.tokens, rollout.seconds
        for row in rows:
            self._samples += 1
            self._judge(self._warpdecode, row)

    def add_stock(self, rollout: Rollout) -> None:
        """Take the clock of the unpatched run."""
        self._stock.tokens, self._stock.seconds = rollout.tokens, rollout.seconds

    def compare(self, ours: dict, stock: dict) -> None:
        """Take the same sample from both ways."""
        self._compared += 1
        self._judge(self._stock, stock)
        if ours["token_ids"] == stock["token_ids"]:
            self._identical += 1
        elif self._first_difference is None:
            # One may be the beginning of the other; then they differ where the shorter one ends.
            pairs = enumerate(zip(ours["token_ids"], stock["token_ids"]))  # noqa: B905
            shorter = min(len(ours["token_ids"]), len(stock["token_ids"]))
            token = next((at for at, (a, b) in pairs if a != b), shorter)
            self._first_difference = (
                f"sample {ours['sample']} of {ours['prompt']!r}, at token {token}: "
                f"warpdecode {ours['text']!r}, transformers alone {stock['text']!r}"
            )

    def _line(self, side: Side) -> str:
        speed = side.tokens / side.seconds if side.seconds else 0.0
        line = f"{side.name:<18} {speed:9.1f} tokens/s ({side.tokens} tokens in {side.seconds:.2f} s)"
        if self._is_right is not None:
            line += f"   {side.right} of {self._samples} sums right"
        return line

    def text(self) -> str:
        """Return the report."""
        lines = [self._line(self._warpdecode)]
        if self._compared:
            lines.append(self._line(self._stock))
            lines.append(f"{self._identical} of {self._compared} samples are identical")
            if self._first_difference is not None:
                lines[-1] += f"; the first difference is in {self._first_difference}"
        return "\n".join(lines)
