"""One expert as a module of three Linears and an activation: which Linear is which, and what happens between them,
found by running it with stand-ins for its Linears."""

import torch
from torch.nn import Linear

from .gate import probe_gate


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


def through(expert, answers: dict, down: str) -> torch.Tensor:
    """What the expert passes to its last Linear when the first two give these answers."""
    end = torch.zeros(1)
    stand_ins, result = _run(expert, answers | {down: end})
    if result is not end:
        raise ValueError("the expert changes what its last Linear gives")
    return stand_ins[down].called_with


def roles_of(expert) -> tuple[str, str, str] | str:
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
        found = probe_gate(lambda g, u, a=gate, b=up: through(expert, {a: g, b: u}, down), torch.device("cpu"))
        if found.arguments is not None:
            return gate, up, down
    return first[0], first[1], down  # the gate is none of those known, which is said when it is asked for
