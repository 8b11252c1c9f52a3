"""The form of a block with one module an expert, as transformers 4 and remote code have them: `experts` is a ModuleList
of three Linears and an activation each. The kernels take a pointer an expert, so nothing is copied.

Where the block has
a method `moe(hidden_states, ids, weights)`, that is replaced and its routing stays its own; otherwise its forward is,
and the routing is one of `blocks.ROUTINGS`.
"""

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import Linear

from . import blocks, state
from .expert import roles_of, through
from .forms import Form, Part, Unknown, own_method
from .probing import changed, double, noted, probing
from .state import has_hooks, own_forward

_LINEARS = 3
_DECISIVE = (bool, float, str)


@dataclass(frozen=True)
class Separate(Form):
    """`roles` are the Linears for gate, up and down; the first `routed` members are experts, the others identities;
    `biased` are the roles with a bias; `recipe` is the block's way, None where it has a method `moe`."""

    roles: tuple[str, str, str]
    routed: int
    identities: int
    biased: tuple[str, ...]
    recipe: blocks.Recipe | None

    @property
    def seam(self) -> str:
        return "moe" if self.recipe is None else "forward"

    def against(self, module):
        members, identities = _members(module._modules["experts"])
        if (len(members), identities) != (self.routed, self.identities):
            return f"it had {self.routed} experts and {self.identities} identities before, and now others"
        return _mixed(members)

    def _linears(self, module):
        members = list(module._modules["experts"]._modules.values())[: self.routed]
        children = [member._modules for member in members]
        return [each.get(role) for role in self.roles for each in children]

    def names(self, module):
        keys = list(module._modules["experts"]._modules)[: self.routed]
        names = [f"experts.{key}.{role}.weight" for role in self.roles for key in keys]
        return (*names, *[f"experts.{key}.{role}.bias" for role in self.biased for key in keys])

    def weights(self, module, names):
        linears, count = self._linears(module), self.routed
        if None in linears:
            return tuple([None for _ in names]), False
        weights = [linear._parameters.get("weight") for linear in linears]
        for role in self.biased:
            first = self.roles.index(role) * count
            weights += [linear._parameters.get("bias") for linear in linears[first : first + count]]
        return tuple(weights), True

    def parts(self, module):
        arguments = ["gate_up_proj", "up_proj", "down_proj"]
        of_bias = dict(zip(self.roles, ("gate_up_bias", "up_bias", "down_bias"), strict=True))
        arguments += [of_bias[role] for role in self.biased]
        return tuple([Part(argument, i * self.routed, self.routed) for i, argument in enumerate(arguments)])

    def state(self, module):
        return state.taken(module, "experts")

    def changed(self, module):
        now = find(module)
        return None if now == self else now.reason if isinstance(now, Unknown) else blocks.CHANGED

    def watch(self, module, weights):
        return _Watch(self, module, weights)

    def gate(self, module):
        expert = module._modules["experts"][0]
        return lambda g, u: through(expert, {self.roles[0]: g, self.roles[1]: u}, self.roles[2])

    def sizes(self, module, weights):
        if not weights or weights[0] is None:
            return super().sizes(module, weights)
        rows, columns = weights[0].shape
        return {"E": self.routed, "H": columns, "I": rows}

    def experts_and_identities(self, module):
        return self.routed, self.identities


class _Watch:
    """Sees with few steps of Python's own whether a block with hundreds of modules is as it was. It keeps the
    dictionaries in which torch.nn.Module has its children, parameters and hooks, which are changed in place, and a copy
    of what was in them. Compared as a whole: what is the same object is equal without a look at it."""

    def __init__(self, form: Separate, module, weights):
        linears, members = form._linears(module), module._modules["experts"]._modules
        self._weights, self._block, self._experts = weights, module._modules, module._modules["experts"]
        self._children = [members, *[each._modules for each in members.values()]]
        self._known = [dict(children) for children in self._children]
        self._modules = _with_children(members.values())
        self._types = list(map(type, self._modules))
        self._hooks = [hooks for each in self._modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._own = state.taken(module, whole=False)
        self._attributes = [each.__dict__ for each in self._modules]
        self._number = sum(map(len, self._attributes))  # a forward on an instance is one more
        plain = [
            (attributes, name, value)
            for each, attributes in zip(self._modules, self._attributes, strict=True)
            if type(each) is not Linear
            for name, value in _plain(each).items()
        ]
        self._plain, self._values = ([p[0] for p in plain], [p[1] for p in plain]), [p[2] for p in plain]
        self._parameters = [
            (name, [each._parameters for each in linears[first * form.routed : (first + 1) * form.routed]])
            for name, roles in (("weight", form.roles), ("bias", form.biased))
            for first in map(form.roles.index, roles)
        ]

    def sees_no_change(self, module) -> bool:
        return (
            self._block["experts"] is self._experts
            and state.holds(self._own, module)
            and sum(map(len, self._attributes)) == self._number
            and all(map(operator.is_, map(dict.get, *self._plain), self._values))
            and self._children == self._known
            and list(map(type, self._modules)) == self._types
            and not any(self._hooks)
            and all(map(operator.is_, self._now(), self._weights))
        )

    def _now(self) -> list:
        return [of_one.get(name) for name, of_all in self._parameters for of_one in of_all]


def find(module: torch.nn.Module) -> Form | None:
    """The form of a block with a ModuleList of experts, or None."""
    experts = module._modules.get("experts")
    if not isinstance(experts, torch.nn.ModuleList) or len(experts) < 2:
        return None
    members, identities = _members(experts)
    reason = _mixed(members)
    if reason is not None:
        return Unknown(reason)
    roles = roles_of(members[0])
    if isinstance(roles, str):
        return Unknown(roles)
    biased = tuple([role for role in roles if members[0]._modules[role].bias is not None])
    recipe = _moe_against(module) if _has_moe(module) else blocks.find(module, blocks.SeparateModules())
    if isinstance(recipe, str):
        return Unknown(recipe)
    if recipe is not None and identities:
        return Unknown("some of its experts are identities, and its forward routes by itself")
    return Separate(roles, len(members), identities, biased, recipe)


def _members(experts) -> tuple[list[torch.nn.Module], int]:
    """(the experts, the number of identities after them)."""
    members = list(experts._modules.values())
    identities = 0
    while members and type(members[-1]) is torch.nn.Identity:
        members.pop()
        identities += 1
    return members, identities


def _with_children(members) -> list[torch.nn.Module]:
    return [*members, *[child for member in members for child in member._modules.values() if child is not None]]


def _mixed(members) -> str | None:
    """The reason why these are not experts of plain Linears, all alike."""
    if not members:
        return "it has no experts but identities"
    first = members[0]
    for i, member in enumerate(members):
        reason = _member_against(i, member, first)
        if reason is not None:
            return reason
    if sum(type(child) is Linear for child in first._modules.values()) != _LINEARS:
        return f"its experts, {type(first).__name__}, are not three Linears (gate, up and down) and an activation"
    for name in (*first._parameters, *first._buffers):  # its others are of the same class
        return f"its experts have {name}, which the kernels would not read"
    return None


def _member_against(i: int, member, first) -> str | None:
    if type(member) is not type(first) or list(member._modules) != list(first._modules):
        return f"its expert {i} is a {type(member).__name__} of other parts than expert 0, a {type(first).__name__}"
    if _plain(member) != _plain(first):
        return f"experts.{i} and experts.0 are not alike: they hold other functions or numbers"
    if has_hooks(member) or own_forward(member) is not None:
        return f"experts.{i} has hooks or a forward of its own, which would not be called"
    for name, child in member._modules.items():
        reason = None if child is None else _child_against(f"experts.{i}.{name}", child)
        if reason is None and not _alike(child, first._modules[name]):
            reason = f"experts.{i}.{name} and experts.0.{name} are not alike: {child} and {first._modules[name]}"
        if reason is not None:
            return reason
    return None


def _plain(module) -> dict:
    """What decides what an expert or an activation computes, as plain attributes: functions (an activation of
    torch.nn.functional among them), numbers that are no sizes, words."""
    return {
        name: value
        for name, value in vars(module).items()
        if (callable(value) or type(value) in _DECISIVE) and name not in (*state.OTHERS, "training", "forward")
    }


def _alike(child, other) -> bool:
    """Whether a part of one expert is as another's: a Linear with a bias or without, the same activation."""
    if child is other or type(child) is not type(other):
        return child is other
    if isinstance(child, Linear):
        return (child.bias is None) == (other.bias is None)
    return vars(child) == vars(other)


def _child_against(name: str, child) -> str | None:
    if has_hooks(child) or own_forward(child) is not None:
        return f"{name} has hooks or a forward of its own, which would not be called"
    if type(child) is not Linear and (isinstance(child, Linear) or next(_held(child), None) is not None):
        return f"{name} is a {type(child).__name__}, not a plain torch.nn.Linear"
    return None


def _held(child) -> Iterator[torch.Tensor]:
    """What an activation has of parameters and buffers, which the kernels would not read."""
    yield from child.parameters()
    yield from child.buffers()


def _has_moe(module) -> bool:
    moe = getattr(type(module), "moe", None)
    return moe is not None and len(inspect.signature(moe).parameters) == 4


def _moe_against(module) -> str | None:
    """The reason when the method is not the sum over the experts, or forward does not call it once."""
    hidden_states = blocks.probe(module)
    if isinstance(hidden_states, str):
        return hidden_states
    stand_ins = blocks.SeparateModules()
    tokens = hidden_states.view(-1, hidden_states.shape[-1])
    calls = []

    def record(*call):
        calls.append(call)
        return torch.zeros_like(call[0])

    with probing(tokens.device):
        twin = double(module, experts=stand_ins.put_in(module._modules["experts"]))
        twin.__dict__["moe"] = record
        try:
            type(module).forward(twin, hidden_states.clone())
            ((_, ids, weights),) = calls
            before = noted(twin)  # what forward changes it will change; what the method does would be lost
            got = own_method(module, "moe")(twin, tokens, ids, weights)
            left = changed(before)
            if left is not None:
                return blocks.BESIDES.format(left)
            if torch.equal(got, stand_ins.routed(tokens, ids, weights)):
                return None
        except Exception as error:  # whatever a foreign method raises
            return f"its method moe could not be probed ({type(error).__name__}: {error})"
    return "its method moe is not the weighted sum of the experts"
