"""Every experts class of the installed transformers that goes through its experts interface, found, built and shrunk
without a line of ours about any of them: a family of a new release is tested the day it is installed."""

import copy
import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

_MODELS = Path(transformers.__file__).parent / "models"
_DECORATED = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)

# What a shrunk module has: small, and multiples of 8 but of nothing larger where the kernels' paths may depend on it.
SIZES = {"experts": 8, "hidden": 72, "intermediate": 40}
_MAX_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Family:
    """One decorated class: its folder in transformers.models, and the class."""

    name: str
    experts_class: type[torch.nn.Module]

    def __str__(self):
        return f"{self.name}-{self.experts_class.__name__}"


def _modules() -> Iterator[tuple[Path, int]]:
    """(file, number of decorators in it) of the modeling files that use the decorator."""
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        count = len(_DECORATED.findall(path.read_text(encoding="utf-8")))
        if count:
            yield path, count


def _import(path: Path):
    return importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")


def _is_decorated(value, module_name: str) -> bool:
    return (
        isinstance(value, type)
        and value.__module__ == module_name
        and hasattr(value, "_apply_gate")
        and hasattr(value.forward, "__wrapped__")
    )


@functools.cache
def families() -> tuple[Family, ...]:
    """All of them. Fails when a decorator in the sources leads to no class: none is lost in silence."""
    found = []
    for path, count in _modules():
        module = _import(path)
        classes = [value for value in vars(module).values() if _is_decorated(value, module.__name__)]
        assert len(classes) == count, f"{path} has {count} decorated classes, found {classes}"
        found += [Family(path.parent.name, experts_class) for experts_class in classes]
    return tuple(found)


def _config_classes(family: Family) -> list[type[PreTrainedConfig]]:
    """The family's config classes, those that its module names first."""
    namespaces = [vars(importlib.import_module(family.experts_class.__module__))]
    for path in sorted((_MODELS / family.name).glob("configuration_*.py")):
        namespaces.append(vars(_import(path)))
    classes = (value for names in namespaces for value in names.values() if isinstance(value, type))
    own = f"transformers.models.{family.name}."
    return list(dict.fromkeys(c for c in classes if issubclass(c, PreTrainedConfig) and c.__module__.startswith(own)))


def _shapes(family: Family, config: PreTrainedConfig) -> dict[str, int]:
    """The module's sizes as its weights have them. Built on the meta device: real sizes cost nothing there."""
    with torch.device("meta"):
        module = family.experts_class(config)
    experts, rows, columns = module.down_proj.shape
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    return {"experts": experts, "hidden": hidden, "intermediate": intermediate}


def _starts(config_class: type[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """The class's default config; then one with a number wherever the default is None: families whose experts are
    optional (Gemma 4) have no number of them until one is chosen; then one with the first of every list of numbers,
    which has one for each kind of layer (ERNIE VL)."""
    try:
        config = config_class()
    except Exception:  # a config made of others, which are tried themselves
        return
    yield config
    for field, value in vars(config).items():
        if value is None:
            with suppress(Exception):  # not a field that takes a number
                setattr(config, field, 16)
    yield config
    for field, value in vars(config).items():
        if isinstance(value, list) and value and type(value[0]) is int:
            vars(config)[field] = value[0]
    yield config


def _shrink(family: Family, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the fields that decide the weights' sizes set to `SIZES`. Each field is known by what changes
    when it does, not by its name."""
    before = _shapes(family, config)
    deciding = {}
    for field, value in vars(config).items():
        if type(value) is not int or value < 1:
            continue
        changed = copy.deepcopy(config)
        try:
            vars(changed)[field] = 2 * value
            after = _shapes(family, changed)
        except Exception:
            continue  # a field that cannot be doubled; should it decide a size, the check below finds it
        for size in SIZES:
            if after[size] != before[size]:
                deciding[field] = size
    small = copy.deepcopy(config)
    for field, size in deciding.items():
        vars(small)[field] = SIZES[size]
    assert _shapes(family, small) == SIZES, f"{family}: {deciding} of {type(config).__name__} do not decide its sizes"
    return small


@functools.cache
def small_config(family: Family) -> PreTrainedConfig:
    """A config of the family's own class, at its defaults but for the sizes, which are `SIZES`."""
    errors = {}
    for config_class in _config_classes(family):
        for config in _starts(config_class):
            try:
                _shapes(family, config)
            except Exception as error:  # a vision config, a config without experts
                errors[config_class.__name__] = repr(error)
                continue
            return _shrink(family, config)
    raise AssertionError(f"{family} could be built from none of its configs: {errors}")


@torch.no_grad()
def build(family: Family, implementation: str = "eager", seed: int = 0) -> torch.nn.Module:
    """The family's experts module, small and random, in fp32 on the CPU, without gradients."""
    config = copy.deepcopy(small_config(family))
    config._experts_implementation = implementation
    module = family.experts_class(config).eval().requires_grad_(False)
    assert sum(p.numel() for p in module.parameters()) <= _MAX_WEIGHTS
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        # Gates and ups of a standard deviation of 4, so that a clamp at 7 or 10 is met.
        fan_in = SIZES["intermediate"] if name.startswith("down") else SIZES["hidden"]
        scale = 1.0 if name.startswith("down") else 4.0
        if parameter.dim() == 3:
            parameter.normal_(std=scale * fan_in**-0.5, generator=generator)
        else:
            parameter.normal_(mean=float("norm" in name), std=0.5, generator=generator)  # biases; norms' gains near 1
    return module


def inputs(tokens: int = 11, top_k: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states, ids, routing weights) for any of these modules, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, SIZES["experts"], generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, SIZES["hidden"], generator=generator), ids, weights
