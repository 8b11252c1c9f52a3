"""Reading prompts files: JSON lines with a ``prompt`` field, or plain text with one prompt a line."""

from __future__ import annotations

import json
from pathlib import Path

from . import GenerateError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


def _is_jsonl(path: Path, first_line: str) -> bool:
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return True
    if suffix == ".txt":
        return False
    try:
        return isinstance(json.loads(first_line), dict)
    except ValueError:
        return False


def _prompt_field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise GenerateError(f"{where} is not JSON ({error}); an object with a 'prompt' field was expected") from None
    if not isinstance(row, dict):
        raise GenerateError(f"{where} is a JSON {type(row).__name__}; an object with a 'prompt' field was expected")
    if "prompt" not in row:
        raise GenerateError(f"{where} has the fields {sorted(row)}; a 'prompt' field was expected")
    if not isinstance(row["prompt"], str):
        raise GenerateError(f"{where} has a 'prompt' of type {type(row['prompt']).__name__}; a string was expected")
    try:
        row["prompt"].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write one half of a pair of surrogates; tokenizers refuse it
        half = row["prompt"][error.start]
        raise GenerateError(f"{where} has a 'prompt' with half a character ({half!a}); text was expected") from None
    return row["prompt"]


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, in its order.

    ``.jsonl``, ``.ndjson`` and ``.json`` files are JSON lines, ``.txt`` files have one prompt a line, and in any other
    file the first line that is not blank decides. Blank lines are skipped. A prompt of a text file is its line as it
    is, leading and trailing spaces included.

    Raises:
        GenerateError: the file cannot be read, has no prompt, or has a line that is none; the text names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise GenerateError(f"the prompts file {path} cannot be read: {error.strerror}") from None
    lines: list[tuple[str, str]] = []
    # Split at newlines only, before decoding: str.splitlines would also split at U+2028 inside a prompt.
    for number, encoded in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            line = encoded.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise GenerateError(f"{where} is not UTF-8 (byte {error.start} of the line)") from None
        if line.strip():
            lines.append((where, line))
    if not lines:
        raise GenerateError(f"the prompts file {path} has no prompts; at least one was expected")
    if _is_jsonl(path, lines[0][1]):
        return [_prompt_field(line, where) for where, line in lines]
    return [line for _, line in lines]
