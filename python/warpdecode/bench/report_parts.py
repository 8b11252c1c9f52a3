"""What all tables of the report need: rows, the conditions that they were measured under, and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

# What tells a row from the others of its table. A row of a layer has `microseconds`, one of generate() has a `model`.
_LAYER = ("shape", "dtype", "device", "routing", "tokens")
_MODEL = ("model", "layers", "device", "mode", "prompt_tokens", "asked_tokens", "batch", "variant")


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSON lines file. Raises OSError, and ValueError for a line that is no row, naming file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); a row was expected") from None
        if not isinstance(row, dict) or not {"microseconds", "model"} & set(row):
            raise ValueError(f"{path}, line {number} is {line[:40]}; a row was expected")
        missing = [key for key in (*_identity(row), "environment") if key not in row]
        if missing:
            raise ValueError(f"{path}, line {number} has no {', '.join(missing)}; a row was expected")
        rows.append(row)
    return rows


def _identity(row: dict) -> tuple[str, ...]:
    return _MODEL if "model" in row else _LAYER


def sections(rows: list[dict], *keys: str | Callable[[dict], object]) -> list[list[dict]]:
    """The rows of each table: they agree in these keys and in what they were measured on, see `setup`.

    Raises ValueError for rows that would have the same place in a table.
    """
    found = list(grouped(rows, *keys, setup).values())
    for part in found:
        for same in grouped(part, lambda row: tuple(row[key] for key in _identity(row))).values():
            if len(same) > 1:
                what = ", ".join(f"{key} {same[0][key]}" for key in _identity(same[0]))
                raise ValueError(f"{len(same)} rows are of {what}, expected one: {conditions(same)}")
    return found


def setup(row: dict) -> str:
    """GPU or processor, and versions. The host is named where it counts: with models and with eager calls."""
    found = row["environment"]
    where = found.get("gpu") or f"CPU {found['processor']}, {found['threads']} threads, {found['kernel']}"
    if "gpu" in found and ("model" in row or "eager_microseconds" in row):
        where += f" in a host of {found['threads']} threads"
    packages = ("warpdecode", "torch", "transformers", "vllm")
    return f"{where}; " + ", ".join(f"{name} {found[name]}" for name in packages if name in found)


def conditions(rows: list[dict]) -> str:
    """The setup that rows have in common, all commits and all dates found among them."""
    commits = list(dict.fromkeys(_short(row["environment"].get("commit")) for row in rows))
    dates = sorted({row["environment"]["date"] for row in rows})
    return f"{setup(rows[0])}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {', '.join(dates)}"


def _short(commit: str | None) -> str:
    return re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", commit or "unknown")


def measured(rows: list[dict]) -> str:
    """How the layers of a section were measured, and under which conditions."""
    first = rows[0]
    replay = "CUDA graph replays, " if first["device"] == "cuda" else ""
    how = f"{first['dtype']}, {replay}cold weights, {first['routing']} routing"
    return f"{how}, medians of {span(row['repeats'] for row in rows)}; {conditions(rows)}"


def span(numbers) -> str:
    """One number where all are the same, and otherwise the least and the largest."""
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def grouped(rows: list[dict], *keys: str | Callable[[dict], object]) -> dict[tuple, list[dict]]:
    """The rows by the values of these keys, or by what these functions say of them, in their order."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(key(row) if callable(key) else row[key] for key in keys), []).append(row)
    return groups


def by_tokens(rows: list[dict], cell: Callable[..., str], head: str | None = None, names=None) -> str:
    """A table of shapes by numbers of tokens. head: of a second column, with a line for each of names(rows of a shape),
    which cell(row, name) then gets, too."""
    tokens, lines = sorted({row["tokens"] for row in rows}), []
    for (shape,), part in grouped(rows, "shape").items():
        found = {row["tokens"]: row for row in part}
        for more in [[name] for name in names(part)] if head else [[]]:
            lines.append([shape, *more, *(cell(found[count], *more) if count in found else "" for count in tokens)])
    return markdown(["shape", *([head] if head else []), *(f"T {count}" for count in tokens)], lines, first=":--")


def markdown(heads: list[str], lines: list[list[str]], first: str = "--:") -> str:
    """A table; all columns but the first are aligned to the right."""
    rule = [first, *("--:" for _ in heads[1:])]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "|".join(rule) + "|"]) + "".join(
        "\n| " + " | ".join(cells) + " |" for cells in lines
    )
