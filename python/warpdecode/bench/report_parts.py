"""What all tables of the report need: rows, the conditions that they were measured under, and Markdown."""

from __future__ import annotations

import json
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSON lines file. Raises OSError, and ValueError for a line that is no row, naming the file."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); a row was expected") from None
    return rows


def conditions(row: dict) -> str:
    """GPU or processor, versions and date of a row, as a sentence."""
    found = row["environment"]
    where = found.get("gpu") or f"{found['threads']} threads of an {found['processor']} CPU ({found['kernel']})"
    packages = ["warpdecode", "torch", "transformers"]
    if any(name.split()[0] == "vllm" for name in row.get("peers", ())):
        packages.append("vllm")
    versions = ", ".join(f"{name} {found[name]}" for name in packages if name in found)
    return f"{where}; {versions}; {found['date']}"


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows by the values of these keys, in their order."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def markdown(heads: list[str], lines: list[list[str]], first: str = "--:") -> str:
    """A table; all columns but the first are aligned to the right."""
    rule = [first, *("--:" for _ in heads[1:])]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "|".join(rule) + "|"]) + "".join(
        "\n| " + " | ".join(cells) + " |" for cells in lines
    )
