"""The form of a block with one module an expert, as transformers 4 and remote code have them: `experts` is a ModuleList
of three Linears and an activation each. The kernels take a pointer an expert, so nothing is copied.

Which Linear is which, and the gate, are found by running an expert with stand-ins for its Linears. Where the block has
a method `moe(hidden_states, ids, weights)`, that is replaced and its routing stays its own; otherwise its forward is,
and the routing is one of `blocks.ROUTINGS`.
"""

import inspect
from dataclasses import dataclass

import torch
from torch.nn import Linear

from . import blocks
from .forms import Form, Part, Unknown, own_method
from .gate import probe_gate

_LINEARS = 3


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

    def structure(self, module):
        members, linears = module._modules["experts"]._modules, self._linears(module)
        # On every call, for hundreds of them: lists are the fastest way to ask.
        hooked = any([each is None or bool(each._forward_hooks or each._forward_pre_hooks) for each in linears])
        return (hooked, *linears, *map(type, linears), *members.values(), *_others(next(iter(members.values()))))

    def gate(self, module):
        expert = module._modules["experts"][0]
        return lambda g, u: _through(expert, {self.roles[0]: g, self.roles[1]: u}, self.roles[2])

    def sizes(self, module, weights):
        if not weights or weights[0] is None:
            return super().sizes(module, weights)
        rows, columns = weights[0].shape
        return {"E": self.routed, "H": columns, "I": rows}

    def experts_and_identities(self, module):
        return self.routed, self.identities


def find(module: torch.nn.Module) -> Form | None:
    """The form of a block with a ModuleList of experts, or None."""
    experts = module._modules.get("experts")
    if not isinstance(experts, torch.nn.ModuleList) or len(experts) < 2:
        return None
    members, identities = _members(experts)
    reason = _mixed(members)
    if reason is not None:
        return Unknown(reason)
    roles = _roles(members[0])
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


def _others(expert) -> list:
    """An expert's activation: what it has besides its Linears."""
    return [child for child in expert._modules.values() if not isinstance(child, Linear)]


def _mixed(members) -> str | None:
    """The reason why these are not experts of plain Linears, all alike."""
    if not members:
        return "it has no experts but identities"
    first = members[0]
    for i, member in enumerate(members):
        if type(member) is not type(first) or list(member._modules) != list(first._modules):
            return f"its expert {i} is a {type(member).__name__} of other parts than expert 0, a {type(first).__name__}"
        for name, child in member._modules.items():
            reason = _child_against(f"experts.{i}.{name}", child)
            if reason is not None:
                return reason
            if isinstance(child, Linear) and (child.bias is None) != (first._modules[name].bias is None):
                return f"experts.{i}.{name} and experts.0.{name} are not alike: one has a bias"
    if sum(type(child) is Linear for child in first._modules.values()) != _LINEARS:
        return f"its experts, {type(first).__name__}, are not three Linears (gate, up and down) and an activation"
    return None


def _child_against(name: str, child) -> str | None:
    if type(child) is Linear:
        # Hooks of device_map wrap `forward` instead; what they bring to a call is seen by its weights.
        hooked = child._forward_hooks or child._forward_pre_hooks
        return f"{name} has hooks, which would not be called" if hooked else None
    if next(child.parameters(), None) is not None or isinstance(child, Linear):
        return f"{name} is a {type(child).__name__}, not a plain torch.nn.Linear"
    return None


class _Given(torch.nn.Module):
    """A stand-in for a Linear: answers the tokens with what is given, and keeps what else it is called with."""

    def __init__(self, tokens, answer):
        super().__init__()
        self.tokens, self.answer, self.asked, self.called_with = tokens, answer, False, None

    def forward(self, x):
        if x is self.tokens:
            self.asked = True
            return self.answer
        self.called_with = x
        return self.answer


def _run(expert, answers: dict):
    """The expert's forward with stand-ins for its Linears: (they, its result)."""
    tokens = torch.empty(0)
    stand_ins = {name: _Given(tokens, answer) for name, answer in answers.items()}
    double = object.__new__(type(expert))
    double.__dict__.update(expert.__dict__)
    double.__dict__["_modules"] = {**expert._modules, **stand_ins}
    return stand_ins, type(expert).forward(double, tokens)


def _through(expert, answers: dict, down: str) -> torch.Tensor:
    """What the expert passes to its last Linear when the first two give these answers."""
    end = torch.zeros(1)
    stand_ins, result = _run(expert, answers | {down: end})
    if result is not end:
        raise ValueError("the expert changes what its last Linear gives")
    return stand_ins[down].called_with


def _roles(expert) -> tuple[str, str, str] | str:
    """The names of the Linears for gate, up and down, or the reason why there are none."""
    names = [name for name, child in expert._modules.items() if type(child) is Linear]
    ones = torch.ones(1)
    try:
        stand_ins, _ = _run(expert, dict.fromkeys(names, ones))
    except Exception as error:  # whatever a foreign forward raises
        return f"its experts could not be probed ({type(error).__name__}: {error})"
    first = [name for name in names if stand_ins[name].asked and stand_ins[name].called_with is None]
    last = [name for name in names if stand_ins[name].called_with is not None and not stand_ins[name].asked]
    if (len(first), len(last)) != (2, 1):
        return f"its experts, {type(expert).__name__}, are not down(activation(gate(x)) * up(x))"
    down = last[0]
    for gate, up in (first, first[::-1]):
        found = probe_gate(lambda g, u, a=gate, b=up: _through(expert, {a: g, b: u}, down), torch.device("cpu"))
        if found.arguments is not None:
            return gate, up, down
    return first[0], first[1], down  # the gate is none of those known, which is said when it is asked for


def _has_moe(module) -> bool:
    moe = getattr(type(module), "moe", None)
    return moe is not None and len(inspect.signature(moe).parameters) == 4


def _moe_against(module) -> str | None:
    """The reason when the method is not the sum over the experts, or forward does not call it once."""
    hidden_states = blocks.probe(module)
    if isinstance(hidden_states, str):
        return hidden_states
    stand_ins = blocks.SeparateModules()
    double = blocks.twin(module, stand_ins.put_in(module._modules["experts"]))
    tokens = hidden_states.view(-1, hidden_states.shape[-1])
    calls = []

    def record(*call):
        calls.append(call)
        return torch.zeros_like(call[0])

    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        try:
            double.__dict__["moe"] = record
            type(module).forward(double, hidden_states.clone())
            ((_, ids, weights),) = calls
            got = own_method(module, "moe")(double, tokens, ids, weights)
            if torch.equal(got, stand_ins.routed(tokens, ids, weights)):
                return None
        except Exception as error:  # whatever a foreign method raises
            return f"its method moe could not be probed ({type(error).__name__}: {error})"
    return "its method moe is not the weighted sum of the experts"
