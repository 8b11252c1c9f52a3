"""What besides its weights decides what a module computes: its class, its plain attributes, those of its activation,
and whether anything is hooked in. What was found by running a module holds as long as these are the same.

An attribute counts under every name that the module or a class of its own has, so a method put on the instance is seen,
too. What lies within an attribute's value (a list, a config) is not looked at.
"""

import operator
import types
from collections.abc import Iterator

import torch

# Of the classes that `replaced.py` makes: their modules' form, and the class that was there before. In a module's
# __dict__, and there only while it is patched: what is known about it, and what it does where it cannot be served.
FORM, BASE = "_warpdecode_form", "_warpdecode_base"
SLOT, POLICY = "_warpdecode_layer", "_warpdecode_policy"

# Who else puts a forward on an instance: accelerate's hooks keep the former one under the second name.
INSTANCE_FORWARDS = ("forward", "_old_forward")

# Containers of torch's, and what we and others keep on a module that says nothing about what it computes.
OTHERS = {
    *vars(torch.nn.Module()), SLOT, POLICY, "config", "_hf_hook", "_old_forward", "_is_hf_initialized",
    "_compiled_call_impl",
}  # fmt: skip
_PARAMETRIZED = "parametrizations"  # where torch keeps what computes a parametrized weight

# What torch.compile can hold a value of as a guard.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_NUMBERS = (bool, int, float, str)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks of torch's are called around the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def class_of(module: torch.nn.Module) -> type:
    """The module's own class, patched and parametrized or not."""
    kind = type(module)
    if _PARAMETRIZED in module._modules and not isinstance(module, torch.nn.Linear):  # of an expert: no longer plain
        kind = kind.__mro__[1]
    return getattr(kind, BASE, kind)


def below(module: torch.nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.nn.Module]]:
    """(path, module) of everything within a module, without itself."""
    for name, child in module._modules.items():
        if child is not None and name != _PARAMETRIZED:
            yield (*path, name), child
            yield from below(child, (*path, name))


def own_forward(module: torch.nn.Module):
    """What somebody put on the instance in the place of its class's forward, or None. Hooks of device_map wrap
    `forward`, too; what they bring to a call is seen by its weights."""
    state = module.__dict__
    return None if "_hf_hook" in state else state.get("forward")


def taken(module: torch.nn.Module, *within: str, whole: bool = True) -> tuple:
    """The state of a module and of all that is within it: of the children named, or of all of them when none is;
    of itself alone without `whole`."""
    found = [_entry((), module)]
    if whole:
        for name in within or module._modules:
            child = module._modules[name]
            if child is not None and name != _PARAMETRIZED:
                found += [_entry((name,), child), *[_entry(path, each) for path, each in below(child, (name,))]]
    return tuple(found)


def _entry(path, module) -> tuple:
    kind, state = class_of(module), module.__dict__
    if kind is torch.nn.Linear:  # of which a block has hundreds, and which is its weights
        return (
            path,
            kind,
            ("forward",),
            (state.get("forward"),),
            has_hooks(module),
            _guarded({"forward": state.get("forward")}),
        )
    names = dict.fromkeys(name for name in state if name not in OTHERS)
    for each in kind.__mro__[: kind.__mro__.index(torch.nn.Module)]:
        names |= dict.fromkeys(name for name in vars(each) if not name.startswith("__"))
    if not path:  # what is put around the patched module's own forward calls it, or is not our call
        names = {name: None for name in names if name not in INSTANCE_FORWARDS}
    names = ("training", *names)
    values = tuple([state.get(name) for name in names])
    guarded = _guarded(dict(zip(names, values, strict=True)))
    return path, kind, names, values, bool(path) and has_hooks(module), guarded


def _guarded(values: dict) -> tuple:
    """What torch.compile can guard: (names without a value, names of functions, (name, number or word))."""
    absent = tuple([name for name, value in values.items() if value is None])
    functions = tuple([name for name, value in values.items() if type(value) in _FUNCTIONS])
    return absent, functions, tuple([pair for pair in values.items() if type(pair[1]) in _NUMBERS])


def holds(known: tuple, module: torch.nn.Module) -> bool:
    """Whether the state is what it was. Asked on every call."""
    for path, kind, names, values, hooked, _ in known:
        each = module
        for name in path:
            each = each._modules.get(name)
            if each is None:
                return False
        if (type(each) is not kind and class_of(each) is not kind) or not all(
            map(operator.is_, map(each.__dict__.get, names), values)
        ):
            return False
        if path and bool(each._forward_hooks or each._forward_pre_hooks) is not hooked:
            return False
    return True


def holds_traced(known: tuple, module: torch.nn.Module, compare: bool = True) -> bool:
    """The same for torch.compile, which guards what is looked at here: so everything is, whatever the first says. A
    hook that comes later it does not see, here or elsewhere. Without `compare` functions are guarded alone: torch can
    compare none with one that came as a constant."""
    same = True
    for path, kind, names, values, hooked, guarded in known:
        each = module
        for name in path:
            each = None if each is None else each._modules.get(name)
        if each is None:
            same = False
            continue
        if class_of(each) is not kind or (path and has_hooks(each) is not hooked):
            same = False
        absent, functions, numbers = guarded
        for name in absent:
            if each.__dict__.get(name) is not None:
                same = False
        for name in functions:
            now = each.__dict__.get(name)
            if now is None or (compare and now is not values[names.index(name)]):
                same = False
        for name, value in numbers:
            if each.__dict__.get(name) != value:
                same = False
    return same


def against(module: torch.nn.Module, names: tuple[str, ...], parts: tuple) -> str | None:
    """The reason why the kernels would not do all that a module does: of its `parts`, (path, module) of what is within
    it, one has hooks or another forward; or there is a parameter or a buffer besides those of these names."""
    for path, part in parts:
        name = ".".join(path)
        if has_hooks(part):
            return f"{name} has hooks, which would not be called"
        if own_forward(part) is not None:
            return f"{name} has a forward of its own on the instance, which would not be called"
    for path, part in (((), module), *parts):
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            known = ".".join((*path, name))
            if known not in names and value is not None:
                return f"it has {known}, which the kernels would not read"
    return None
