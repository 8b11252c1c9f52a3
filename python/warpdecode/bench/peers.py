"""The peers: which of them this machine has, and their calls on the same weights and inputs."""

from __future__ import annotations

import importlib.util
import os
import sys

from warpdecode.bench import peer_transformers, peer_vllm
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.timers import reason

NAMES = ("transformers", "vllm", "vllm-invariant")
_MODULES = {"transformers": peer_transformers, "vllm": peer_vllm}


def say(text: str) -> None:
    """One line on stderr: whatever is left out is left out with a reason."""
    print(f"warpdecode bench: {text}", file=sys.stderr, flush=True)


def chosen(text: str | None, device: str) -> list[str]:
    """The peers of a comma-separated list that can be used here; None: all that are installed.

    What was asked for or is installed, but cannot be used, is said on stderr. Raises ValueError for other names.
    """
    asked = list(NAMES) if text is None else [name for name in text.split(",") if name not in ("", "none")]
    unknown = [name for name in asked if name not in NAMES]
    if unknown:
        raise ValueError(f"was {', '.join(unknown)}, expected none or some of {', '.join(NAMES)}")
    found = []
    for name in asked:
        package = name.split("-")[0]
        if package == "vllm" and device != "cuda":
            if text is not None:
                say(f"peer {name} left out: it runs on CUDA only")
        elif importlib.util.find_spec(package) is None:
            if text is not None:
                say(f"peer {name} left out: {package} is not installed")
        elif name == "vllm-invariant" or _can_load(name):  # the former is imported in a process of its own
            found.append(name)
    return found


def _can_load(name: str) -> bool:
    if name == "vllm":
        os.environ.pop("VLLM_BATCH_INVARIANT", None)  # of this process: plain vLLM is what is meant
    try:
        load(name)
    except Exception as error:  # imports of large packages fail in many ways
        say(f"peer {name} left out: importing it failed: {reason(error)}")
        return False
    return True


def load(name: str) -> None:
    """Imports a peer. Raises what its import raises."""
    _MODULES[name].load()


def candidates(names: list[str], layers, inputs: list, *, eager: bool) -> dict[str, Candidate]:
    """The peers' candidates by the names of a row. eager: transformers' slow loop over the experts, too."""
    found = {}
    for name in names:
        found.update(_MODULES[name].candidates(layers, inputs, eager=eager))
    return found
