"""Everything a run's samples depend on, by name: what ``OUTPUT.meta.json`` holds and a resumed run is compared with.

The model is identified by what its files contain. A trainer writes its next weights under the same name and with the
same sizes, and a file whose first half came from one model and whose second half from the next would be the worst
outcome of a resume, so the weights are hashed as a whole. That reads them once more, on several threads at once, and
the load that follows finds them in the page cache. A model from the hub is identified by its commit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

import warpdecode

from . import GenerateError

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
OTHER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Configurations and tokenizers; a README may change."""


def digest_of(texts: Iterable[str]) -> str:
    """Return a hash of a sequence of texts."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)  # the length, so that ["ab"] is not ["a", "b"]
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def _files_digest(folder: Path, suffixes: tuple[str, ...]) -> str:
    paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashlib releases the GIL
        digests = list(pool.map(_file_digest, paths))
    return digest_of(text for path, digest in zip(paths, digests, strict=True) for text in (path.name, digest))


def model_identity(model: str) -> dict[str, str]:
    """Return what tells a model from others: of a local folder its files' hashes, of a hub name the commit."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise GenerateError(f"the folder {model} has no config.json; a transformers model was expected")
        return {
            "model": os.path.realpath(folder),
            "model weights": _files_digest(folder, WEIGHTS_SUFFIXES),
            "model config and tokenizer": _files_digest(folder, OTHER_SUFFIXES),
        }
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise GenerateError(f"{model} is neither a folder nor a model that can be had from the hub: {error}") from None
    return {"model": model, "model commit": str(config._commit_hash)}


def pick_device(asked: str | None) -> torch.device:
    """Return the device asked for; without one, CUDA where torch and warpdecode can both use it, or the CPU."""
    usable, why_not = warpdecode.cuda_usable()
    if asked is None:
        if torch.cuda.is_available() and not usable:  # never in silence: the CPU is many times slower
            print(f"Running on the CPU: torch can use CUDA, but warpdecode cannot: {why_not}", file=sys.stderr)
        return torch.device("cuda" if torch.cuda.is_available() and usable else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise GenerateError(f"--device {asked} is no device of torch; cpu, cuda or cuda:N was expected") from None
    if device.type not in ("cpu", "cuda"):
        raise GenerateError(f"--device {asked} was given; warpdecode runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GenerateError(f"--device {asked} was given; this torch ({torch.__version__}) sees no such GPU")
    if device.type == "cuda" and not usable:
        raise GenerateError(f"--device {asked} was given, but warpdecode cannot use CUDA: {why_not}")
    return device


def device_name(device: torch.device) -> str:
    """Return the hardware as far as the bits of torch's kernels depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"


def run_settings(args: argparse.Namespace, model: str, prompts: list[str], device: torch.device) -> dict:
    """Return the settings of a run. Names with spaces are facts; the others are the command's options."""
    return {
        **model_identity(model),
        "prompts": len(prompts),
        "prompts hash": digest_of(prompts),
        "samples": args.samples,
        "max-new-tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top-p": args.top_p,
        "seed": args.seed,
        # Which sequences share a batch decides the padding, and with it the rounding of layers that are not batch
        # invariant, on CPUs and GPUs alike.
        "batch-size": args.batch_size,
        # "auto" is a fixed type too: the model's files decide it, and they are hashed.
        "dtype": args.dtype,
        "device": device.type,
        "device name": device_name(device),
        "warpdecode version": warpdecode.__version__,
        "warpdecode numerics": warpdecode.numerics_id(),
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }
