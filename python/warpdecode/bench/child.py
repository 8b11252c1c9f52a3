"""A measurement in a process of its own, for a peer that reads its mode from the environment when it is imported.

The child measures its own read ceiling and its own `warpdecode` beside the peer, so that a ratio is taken side by side.
It lives as long as the benchmark (importing vLLM takes longer than measuring a shape), gives its GPU memory back after
each request, and is started anew where it died. Requests and answers are JSON lines over its stdin and stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import subprocess
import sys

from warpdecode.shapes import Shape

INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
INVARIANT_NAME = "vllm batch-invariant"
_TIMEOUT_SECONDS = 420  # compiling a peer's kernels included


class ChildFailed(RuntimeError):
    """The child could not answer. final: asking again is of no use."""

    def __init__(self, text: str, final: bool = False):
        super().__init__(text)
        self.final = final


class Child:
    """A process that answers requests of `measure`, with these variables added to its environment."""

    def __init__(self, variables: dict[str, str]):
        self._variables, self._process = variables, None

    def measure(self, shape: Shape, dtype: str, tokens: list[int], **options) -> tuple[dict[int, dict], str | None]:
        """Rows by number of tokens, as `measure.measure` gives them, and why some are missing. Raises ChildFailed where
        all are."""
        request = {"shape": vars(shape), "dtype": dtype, "tokens": tokens, **options}
        answer = self._ask(json.dumps(request))
        if "error" in answer and not answer.get("rows"):
            raise ChildFailed(answer["error"], answer.get("final", False))
        return {row["tokens"]: row for row in answer["rows"]}, answer.get("error")

    def _ask(self, request: str) -> dict:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "warpdecode.bench.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **self._variables}, text=True, encoding="utf-8",
            )  # fmt: skip
        process, line = self._process, ""
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], _TIMEOUT_SECONDS)[0]:
                self.close(kill=True)
                raise ChildFailed(f"no answer within {_TIMEOUT_SECONDS} s")
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended; so has its stdout
        if not line:
            self.close()
            raise ChildFailed(f"the process ended with exit code {process.returncode}")
        return json.loads(line)

    def close(self, kill: bool = False) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        try:
            process.communicate(timeout=30)  # closes stdin, which ends it
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        except BrokenPipeError:
            process.wait()


def merge(row: dict, apart: dict, peer: str, name: str) -> None:
    """Adds to a row the child's peer under a name; ratio and ceiling beside it are those of the child's process."""
    config = apart.get("vllm_config")
    if name == INVARIANT_NAME and peer in apart["microseconds"] and not (config or {}).get("batch_invariant"):
        row["failed"][name] = f"its process does not say that it is batch-invariant, but {config}"
        return
    apart_times = apart["microseconds"]
    more = ("of_ceiling", "of_two_reads", "clocks", "vllm_config", "calls", "repeats")
    row.setdefault("apart", {})[name] = {
        "microseconds": apart_times,
        **{key: apart[key] for key in more if key in apart},
    }
    if peer not in apart_times:
        row["failed"][name] = apart["failed"].get(peer, "not measured")
        return
    row["microseconds"][name] = apart_times[peer]
    row["peers"].append(name)
    row["peer_errors"][name] = apart["peer_errors"][peer]
    row["ratios"][name] = apart["ratios"][peer]
    row["tflops"][name] = apart["tflops"][peer]
    if peer in apart.get("eager_microseconds", {}) and "eager_microseconds" in row:
        row["eager_microseconds"][name] = apart["eager_microseconds"][peer]
    if row.get("kernels_seen") and apart.get("kernels_seen"):
        row["kernels_seen"][name] = apart["kernels_seen"][peer]


def _answer(request: dict) -> dict:
    from warpdecode.bench import peers
    from warpdecode.bench.failures import reason
    from warpdecode.bench.measure import measure

    rows: list[dict] = []
    try:
        for name in request["peers"]:
            peers.load(name)
    except Exception as error:
        return {"error": f"importing it failed: {reason(error)}", "final": True}
    try:
        shape = Shape(**request.pop("shape"))
        dtype, tokens, device = (request.pop(name) for name in ("dtype", "tokens", "device"))
        rows.extend(measure(shape, dtype, tokens, device, request.pop("routing"), [], **request))
    except Exception as error:
        return {"error": reason(error), "rows": rows}
    return {"rows": rows}


def free_memory() -> None:
    """Gives what is no longer used back to the device, for the other process."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def serve() -> None:
    """Answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the answers
    for line in sys.stdin:
        answer = _answer(json.loads(line))
        free_memory()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the parent says it
        serve()
