"""The output file as a journal: lines are appended in order, under a lock, and a later call goes on after the last.

Beside ``OUTPUT`` lies ``OUTPUT.meta.json`` with the settings the file was begun with. They are kept apart so that
every line of the output is a sample, for any reader of JSON lines.

What survives what:

* The settings are written to a temporary file, synced and renamed before the first sample, so they are there as a whole
  or not at all, and never missing beside samples.
* A batch's lines go out in one write, followed by ``fsync``: a killed process loses nothing that was written, and a
  machine that goes down loses at most the batch in flight. A batch takes seconds and a sync milliseconds, so there is
  nothing to gain from syncing less often.
* A kill in the middle of that write leaves some whole lines and perhaps a part of one. The part has no newline and is
  cut off when the file is opened again; the whole lines are kept, and checked to be the samples that belong there.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import GenerateError

FORMAT = 1
"""Version of the sidecar's layout; another one is refused like any other setting."""


def meta_path(output: Path) -> Path:
    """Return the path of the settings that belong to an output file."""
    return output.with_name(output.name + ".meta.json")


def _sync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _refuse_other_settings(output: Path, begun: dict, given: dict) -> None:
    def shown(settings: dict, name: str) -> str:
        return json.dumps(settings[name]) if name in settings else "not recorded"

    names = [*given, *(name for name in begun if name not in given)]
    differing = [
        f"{name} was {shown(begun, name)} and is now {shown(given, name)}"
        for name in names
        if shown(begun, name) != shown(given, name)
    ]
    if differing:
        raise GenerateError(
            f"{output} was begun with other settings: {'; '.join(differing)}. "
            "Give the settings it was begun with to resume it, or name another --output."
        )


class Journal:
    """An output file, open for appending and locked against other runs. Use as a context manager.

    Args:
        output: the file; begun if it does not exist, resumed if it does.
        settings: what the samples depend on, by name; values that JSON can hold.
        prompts: of the run, in order.
        samples: per prompt. Line ``n`` of the finished file is sample ``n % samples`` of prompt ``n // samples``.
        extra: kept beside the settings when the file is begun, and not compared (see ``extra``).

    Raises:
        GenerateError: the file is in use, was begun with other settings, or holds something else.
    """

    def __init__(self, output: Path, settings: dict, prompts: Sequence[str], samples: int, extra: dict) -> None:
        self.output = output
        self.written = 0
        """How many samples the file holds."""
        self.total = len(prompts) * samples
        self._prompts, self._samples = prompts, samples
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            try:
                self._file, new = os.open(output, flags | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                self._file, new = os.open(output, flags), False
        except OSError as error:
            raise GenerateError(f"the output file {output} cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise GenerateError(f"the output {output} is not a regular file, which a run could be resumed from")
            self._lock()
            self.extra = self._begin_or_resume({"format": FORMAT, **settings}, extra, new)
            """What was given as ``extra`` when the file was begun, which may have been an earlier run."""
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            # On the descriptor, so that the lock ends with the process however it ends: no stale lock files.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GenerateError(f"{self.output} is being written by another run; wait for it or end it") from None
        except OSError as error:
            raise GenerateError(
                f"{self.output} cannot be locked ({error.strerror}); a file system with flock was expected"
            ) from None

    def _begin_or_resume(self, settings: dict, extra: dict, new: bool) -> dict:
        meta = meta_path(self.output)
        # A new file has nothing to resume: settings that lie there are those of a file which was removed since.
        begun = None if new else self._read_meta(meta)
        if begun is None:
            if os.fstat(self._file).st_size:
                raise GenerateError(
                    f"{self.output} has content but no {meta.name} beside it, so it is not known what it was begun "
                    "with; name another --output"
                )
            try:
                _write_atomically(meta, json.dumps({"settings": settings, "extra": extra}, indent=2) + "\n")
            except OSError as error:
                raise GenerateError(f"{meta} cannot be written: {error.strerror}") from None
            return extra
        _refuse_other_settings(self.output, begun["settings"], settings)
        self._count_rows()
        return begun["extra"]

    @staticmethod
    def _read_meta(meta: Path) -> dict | None:
        try:
            begun = json.loads(meta.read_text(encoding="utf-8"))
            if isinstance(begun["settings"], dict) and isinstance(begun["extra"], dict):
                return begun
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        raise GenerateError(f"{meta} is not what warpdecode generate writes; name another --output")

    def _count_rows(self) -> None:
        whole = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                self._check(number, line)
                self.written += 1
                whole += len(line)
        if whole != os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self.output}, line {number + 1}"
        if number >= self.total:
            raise GenerateError(
                f"{where} is beyond the last sample of this run; the file was changed by something else"
            )
        prompt, sample = self._prompts[number // self._samples], number % self._samples
        try:
            row = json.loads(line)
            belongs = row["prompt"] == prompt and row["sample"] == sample
        except (ValueError, KeyError, TypeError):
            belongs = False
        if not belongs:
            raise GenerateError(
                f"{where} is not sample {sample} of the prompt {prompt!r}, which belongs there; "
                "the file was changed by something else"
            )

    @property
    def complete(self) -> bool:
        """Whether every sample is in the file."""
        return self.written == self.total

    def append(self, rows: list[dict]) -> None:
        """Write the next samples and return when they are on the disk."""
        # ASCII: a U+2028 in a prompt or a text would be the end of a line to some readers.
        lines = "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows).encode("ascii")
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
            os.fsync(self._file)
        except OSError as error:
            raise GenerateError(
                f"{self.output} cannot be written: {error.strerror}; what was written is kept, the same command resumes"
            ) from None
        self.written += len(rows)

    def count_lines(self) -> int:
        """Return how many samples the file holds, also after an interruption in the middle of ``append``."""
        with self.output.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def rows(self) -> Iterator[dict]:
        """Yield the samples that the file holds, from the first."""
        with self.output.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
