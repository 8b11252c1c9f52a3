"""The peers: which of them this machine has, and their calls on the same weights and inputs."""

from __future__ import annotations

import importlib.util
import os

from warpdecode.bench import options, peer_transformers, peer_vllm
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.failures import reason, say

NAMES = ("transformers", "vllm", "vllm-invariant")
_IMPORT = "importing it failed: "
_MODULES = {"transformers": peer_transformers, "vllm": peer_vllm}


def chosen(text: str | None, device: str) -> tuple[list[str], dict[str, str]]:
    """The peers of a comma-separated list that can be used here, and of its others why not; None: all that are
    installed.

    What was asked for or is installed, but cannot be used, is said on stderr. Raises ValueError for other names.
    """
    found, missing = [], {}
    nothing = text is not None and text.strip() == "none"
    names = [] if nothing else list(NAMES) if text is None else options.names(text, NAMES, "none or some of")
    for name in names:
        package = name.split("-")[0]
        if package == "vllm" and device != "cuda":
            missing[name] = "it runs on CUDA only"
        elif importlib.util.find_spec(package) is None:
            missing[name] = "not installed"
        elif name != "vllm-invariant" and (why := _import_fails(name)):  # that one is imported in a process of its own
            missing[name] = why
        else:
            found.append(name)
            continue
        if text is not None or missing[name].startswith(_IMPORT):
            say(f"peer {name} left out: {missing[name]}")
    return found, missing


def _import_fails(name: str) -> str | None:
    if name == "vllm":
        os.environ.pop("VLLM_BATCH_INVARIANT", None)  # of this process: plain vLLM is what is meant
    try:
        load(name)
    except Exception as error:  # imports of large packages fail in many ways
        return f"{_IMPORT}{reason(error)}"
    return None


def load(name: str) -> None:
    """Imports a peer. Raises what its import raises."""
    _MODULES[name].load()


def candidates(
    names: list[str], layers, inputs: list, *, eager: bool
) -> tuple[dict[str, Candidate], dict[str, str], dict[str, str]]:
    """The peers' candidates by the names of a row, why some are left out on purpose, and why some could not be made.

    eager: transformers' slow loop over the experts, too.
    """
    found, left_out, failed = {}, {}, {}
    for name in names:
        try:
            more, without = _MODULES[name].candidates(layers, inputs, eager=eager)
        except Exception as error:
            failed[name] = reason(error)
        else:
            found.update(more)
            left_out.update(without)
    return found, left_out, failed
