"""Forms of classes outside transformers' experts interface that keep all experts in a few tensors: Step 3 and LongCat
(gate and up in one, perhaps with identity experts beyond the others), DBRX (three of [E * I, H]), and the block of
Llama 4, whose experts see tokens that are weighted already.

A class is known by the tensors it has and the arguments it takes; then its own forward is run on a few tokens and
compared with the kernels. Another layout or formula is off by as much as the output itself, roundings by a hundredth.
"""

import inspect
from dataclasses import dataclass

import torch

from . import blocks
from .forms import Form, Part, Unknown, has_hooks, on_loan, own_method

_LARGEST_DIFFERENCE = 1 / 16


def find(module: torch.nn.Module) -> Form | None:
    """The form of an experts module, or of a block around experts that take no ids; None: none of these."""
    if has_tensors(module, "gate_up_proj", "down_proj") and _arguments(module) == 3:
        return STACKED
    inner = module._modules.get("mlp")
    if inner is not None and has_tensors(inner, "w1", "v1", "w2") and _arguments(module) == 3:
        return FLAT
    inner = module._modules.get("experts")
    if inner is not None and has_tensors(inner, "gate_up_proj", "down_proj") and _arguments(inner) == 1:
        recipe = blocks.find(module, blocks.WeightedTokens())
        return Unknown(recipe) if isinstance(recipe, str) else WeightedBlock(recipe)
    return None


def has_tensors(module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in names)


def _arguments(module) -> int:
    """How many arguments its forward takes."""
    return len(inspect.signature(type(module).forward).parameters) - 1


class Child(Form):
    """A form whose weights are those of a child module."""

    child = ""
    own_names = ()

    def against(self, module):
        return f"{self.child} has hooks, which would not be called" if has_hooks(module._modules[self.child]) else None

    def structure(self, module):
        child = module._modules[self.child]
        return (child, has_hooks(child), *super().structure(child))

    def names(self, module):
        return tuple([f"{self.child}.{name}" for name in self.own_names])

    def weights(self, module, names):
        child = module._modules[self.child]
        weights = tuple(map(child._parameters.get, self.own_names))
        for weight in weights:
            if weight is None:
                return tuple([getattr(child, name, None) for name in self.own_names]), False
        return weights, not (on_loan(module) or on_loan(child))


class Stacked(Form):
    """`gate_up_proj` and `down_proj` of all experts, (E, 2I, H) and (E, H, I) or transposed. Where `down_proj` has
    fewer experts, the rest are identities: their part is added to what the kernels give."""

    def names(self, module):
        return ("gate_up_proj", "down_proj")

    def parts(self, module):
        return _parts(module.gate_up_proj, module.down_proj)

    def arguments(self, module):
        return _arguments_of(module.gate_up_proj, module.down_proj)

    def gate(self, module):
        return _gate(module)

    def sizes(self, module, weights):
        return _sizes(*weights)

    def experts_and_identities(self, module):
        return module.down_proj.shape[0], module.gate_up_proj.shape[0] - module.down_proj.shape[0]

    def difference(self, module, experts):
        known, identities = self.experts_and_identities(module)
        tokens = 8
        weights, _ = self.weights(module, self.names(module))
        x = probe_tokens(experts, tokens, self.sizes(module, weights)["H"])
        ids = torch.arange(2 * tokens, device=x.device).view(tokens, 2) % known
        if identities:
            ids[::2, 1] = known + ids[::2, 1] % identities
        routing = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(1)).to(x)
        ours = lambda: self.returned(module, x, ids, routing, experts(x, ids, routing))  # noqa: E731
        return compared(lambda: own_method(module)(module, x, ids, routing), ours)


class Flat(Child):
    """`mlp.w1`, `mlp.v1` and `mlp.w2`, each [E * I, H]; an expert of the last is (I, H)."""

    child, own_names = "mlp", ("w1", "v1", "w2")

    def _shape(self, module):
        rows, hidden = module.mlp.w1.shape
        return module.num_experts, rows // module.num_experts, hidden

    def parts(self, module):
        shape = self._shape(module)
        return tuple([Part(name, i, None, shape) for i, name in enumerate(("gate_up_proj", "up_proj", "down_proj"))])

    def arguments(self, module):
        return {"is_transposed": "down"}

    def structure(self, module):
        return (*super().structure(module), module.mlp.activation_fn)

    def gate(self, module):
        return lambda g, u: module.mlp.activation_fn(g) * u

    def sizes(self, module, weights):
        return dict(zip("EIH", self._shape(module), strict=True))

    def experts_and_identities(self, module):
        return module.num_experts, 0

    def returned(self, module, hidden_states, ids, weights, out):
        return out.view(out.shape[0], 1, -1) if hidden_states.dim() == 2 else out.view(hidden_states.shape)

    difference = Stacked.difference


@dataclass(frozen=True)
class WeightedBlock(Child):
    """A block whose `experts`, of two tensors, take every token once an expert, weighted by its score."""

    recipe: blocks.Recipe

    child, own_names = "experts", ("gate_up_proj", "down_proj")

    def parts(self, module):
        return _parts(module.experts.gate_up_proj, module.experts.down_proj)

    def arguments(self, module):
        return {"weight_on_input": True} | _arguments_of(module.experts.gate_up_proj, module.experts.down_proj)

    def gate(self, module):
        return _gate(module.experts)

    def sizes(self, module, weights):
        return _sizes(*weights)

    def difference(self, module, experts):
        sizes = _sizes(module.experts.gate_up_proj, module.experts.down_proj)
        total, hidden = sizes["E"], sizes["H"]
        x = probe_tokens(experts, total, hidden)
        ids = torch.arange(total, device=x.device).view(total, 1)
        weights = torch.ones(total, 1, dtype=x.dtype, device=x.device)
        own = lambda: type(module.experts).forward(module.experts, x).view(total, hidden)  # noqa: E731
        return compared(own, lambda: experts(x, ids, weights))


def _parts(gate_up, down):
    shape = None if gate_up.shape[0] == down.shape[0] else (down.shape[0], *gate_up.shape[1:])
    return Part("gate_up_proj", 0, None, shape), Part("down_proj", 1)


def _arguments_of(gate_up, down) -> dict:
    return {"is_transposed": True} if _is_transposed(gate_up, down) else {}


def _is_transposed(gate_up, down) -> bool:
    return gate_up.dim() == down.dim() == 3 and gate_up.shape[2] == 2 * down.shape[1]


def _sizes(gate_up, down) -> dict[str, int | None]:
    if gate_up is None or down is None or down.dim() != 3:
        return {"E": None, "H": None, "I": None}
    e, a, b = down.shape
    return {"E": e, "H": b, "I": a} if _is_transposed(gate_up, down) else {"E": e, "H": a, "I": b}


def _gate(module):
    if hasattr(module, "_apply_gate"):
        return lambda g, u: module._apply_gate(torch.cat([g, u], dim=-1))
    return lambda g, u: module.act_fn(g) * u


def probe_tokens(experts, tokens: int, hidden: int) -> torch.Tensor:
    """Random hidden states for these experts."""
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))
    return x.to(experts.down_proj.device, experts.down_proj.dtype)


@torch.no_grad()
def compared(own, ours) -> str | None:
    """The reason when two ways to the same output differ by more than roundings."""
    try:
        expected, got = own(), ours()
    except Exception as error:  # whatever a foreign forward raises
        return f"its own forward could not be probed ({type(error).__name__}: {error})"
    if expected.shape != got.shape:
        return f"its own forward gives {tuple(expected.shape)} on a probe, and the kernels {tuple(got.shape)}"
    norm = expected.double().norm()
    if norm == 0:
        return "its own forward gives nothing but zeros on a probe (weights not loaded yet?), which shows nothing"
    difference = (expected.double() - got.double()).norm()
    if bool(difference <= _LARGEST_DIFFERENCE * norm):  # false of NaN
        return None
    return f"its own forward differs from the kernels' result on a probe ({difference / norm:.2g} of it)"


STACKED, FLAT = Stacked(), Flat()
