"""transformers' two registries of experts implementations: name -> function(module, hidden_states, ids, weights).

Both are mappings shared by all interface objects that transformers makes, so an entry holds for the whole process.
"""

from collections.abc import Callable

from transformers import __version__ as VERSION

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
except ImportError:  # transformers 4: there is none, and only `patch` works
    ALL_EXPERTS_FUNCTIONS = ExpertsInterface = None

try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
except ImportError:  # before 5.7 this module needs Triton
    ALL_FP8_EXPERTS_FUNCTIONS = FP8Experts = None

_DECORATOR = getattr(ExpertsInterface, "__module__", None)  # where it is defined

# Since 5.7 transformers accepts every name that a registry has; before, a fixed list of its own.
NAMES_ARE_OPEN = tuple(int(part) for part in VERSION.split(".")[:2]) >= (5, 7)

FORWARD: dict[str, Callable] = {} if ExpertsInterface is None else ExpertsInterface._global_mapping
FP8_FORWARD: dict[str, Callable] | None = (
    None if ALL_FP8_EXPERTS_FUNCTIONS is None else type(ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping
)


def demand_interface(what: str, since: str) -> None:
    """Raises RuntimeError where transformers has no experts interface; `what` needs that of a release `since`."""
    if ExpertsInterface is None:
        raise RuntimeError(
            f"warpdecode: {what} needs transformers' experts interface, which transformers {VERSION} does not have; "
            f"{since} and newer do. warpdecode.hf.patch(model) works with this one."
        )


def as_written(experts_class: type) -> Callable:
    """The class's forward as it was written, which transformers' decorator keeps for "eager". Of a subclass with a
    decorated forward of its own that is what its base class has, which it calls."""
    for each in experts_class.__mro__:
        forward = vars(each).get("forward")
        if getattr(forward, "__globals__", {}).get("__name__") == _DECORATOR:
            return forward.__wrapped__
    return experts_class.forward.__wrapped__


def implementation(name: str | None, default: Callable) -> Callable:
    """The function registered under `name`, `default` for "eager"; never one of ours but the function that it took the
    place of. Raises KeyError for a name that is not registered, as transformers does."""
    function = default if name in (None, "eager") else ALL_EXPERTS_FUNCTIONS[name]
    return getattr(function, "in_place_of", function)
