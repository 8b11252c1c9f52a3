"""How a module is told to use the kernels, and what happens when they cannot serve it.

transformers' experts modules look up their implementation on every call, by name, in `module.config`. `patch` puts a
`PatchedConfig` there: it answers our name to that one question and is the model's config in everything else. Nothing of
the model's own config changes, so `generate()` may switch it between grouped_mm and batched_mm, two models may share
it, hooks may wrap the module's forward before or after us, and unpatching is putting the old object back.
"""

import itertools
import warnings
import weakref

import torch

NAME = "warp_decode"

# Policies by key, for code under torch.compile, which can pass strings but no objects.
policies: "weakref.WeakValueDictionary[str, Policy]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


class WarpDecodeFallbackWarning(UserWarning):
    """A Mixture-of-Experts layer runs the model's own path instead of warpdecode's kernels."""


class WarpDecodeFallbackError(RuntimeError):
    """A layer cannot be served by warpdecode's kernels, and `strict=True` forbids the model's own path."""


class Policy:
    """What one model's layers do when they cannot be served: `strict` raises, otherwise each reason is said once."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.said = set()
        self.key = f"policy {next(_numbers)}"
        policies[self.key] = self

    def __reduce__(self):  # a copied or unpickled model is another model: it has said nothing yet
        return Policy, (self.strict,)

    def report(self, class_name: str, own_path: str, reason: str) -> None:
        """Warns once per (class, reason), or raises when strict."""
        if self.strict:
            raise WarpDecodeFallbackError(
                f"warpdecode: {class_name} cannot be served: {reason}. strict=True forbids its own path ({own_path})."
            )
        if (class_name, reason) not in self.said:
            self.said.add((class_name, reason))
            warn(
                f"warpdecode: {class_name} takes its own path ({own_path}) instead of the kernels: {reason}. "
                "This is said once per model and reason; patch(model, strict=True) raises instead."
            )


def warn(text: str) -> None:
    """Warns with our category. Python's registry of what was said already is left out: the books are kept per model,
    and a second model must be heard even when its sentence is the same."""
    warnings.warn_explicit(text, WarpDecodeFallbackWarning, "warpdecode.hf", 1, module="warpdecode.hf", registry={})


class PatchedConfig:
    """A module's config as seen by a patched module: its implementation is ours, all else is read from and written to
    `inner`, the object that was there before."""

    __slots__ = ("__weakref__", "_experts_implementation", "inner", "policy")

    def __init__(self, inner, policy: Policy, name: str = NAME):
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "_experts_implementation", name)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)

    def __repr__(self):
        return f"PatchedConfig({type(self.inner).__name__}, strict={self.policy.strict})"

    def __reduce__(self):
        return _restore, (self.inner, self.policy)


def _restore(inner, policy):
    # A patched model unpickled in a new process: the name it asks for has to be there.
    from .forward import enter_registries

    enter_registries()
    return PatchedConfig(inner, policy)


class ModelPolicies:
    """One policy for each model that has no object of ours, told apart by the config that its modules share."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.while_compiling = Policy(strict)  # of all such models: traced code has no config to ask for
        # Configs are not hashable, so identity is the key, and the weak reference both guards against a reused id and
        # removes the entry.
        self._by_config: dict[int, tuple[weakref.ref, Policy]] = {}

    def of(self, module: torch.nn.Module) -> Policy:
        """The policy of the model that `module` belongs to."""
        config = module.config
        key = id(config)
        entry = self._by_config.get(key)
        if entry is None or entry[0]() is not config:
            entry = (weakref.ref(config, lambda _: self._by_config.pop(key, None)), Policy(self.strict))
            self._by_config[key] = entry
        return entry[1]


_by_name = ModelPolicies()


def policy_of(module: torch.nn.Module) -> Policy:
    """The policy of the model that `module` belongs to: the patch's, or one per config when used by name."""
    config = module.config
    return config.policy if type(config) is PatchedConfig else _by_name.of(module)


def policy_key(module: torch.nn.Module) -> str:
    """The key of the same in `policies`, for code that is being compiled."""
    config = module.config
    return config.policy.key if type(config) is PatchedConfig else _by_name.while_compiling.key


def asked_for(module: torch.nn.Module) -> bool:
    """Whether `module` is told to use the kernels, by `patch` or by name."""
    return getattr(module.config, "_experts_implementation", None) == NAME


def own_implementation(module: torch.nn.Module) -> str | None:
    """The implementation `module` would use without us. By name there is no former one left to know: then it is
    grouped_mm, which transformers chooses when nobody asks for anything."""
    config = module.config
    name = (config.inner if type(config) is PatchedConfig else config)._experts_implementation
    return "grouped_mm" if name == NAME else name
