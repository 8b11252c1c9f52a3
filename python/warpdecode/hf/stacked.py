"""Forms of classes outside transformers' experts interface that keep all experts in a few tensors: Step 3 and LongCat
(gate and up in one, perhaps with identity experts beyond the others), DBRX (three of [E * I, H]), and the block of
Llama 4, whose experts see tokens that are weighted already.

A class is known by the tensors it has and the arguments it takes; then its own forward is run on a few tokens and
compared with the kernels. Another layout or formula is off by as much as the output itself, roundings by a hundredth.
"""

import inspect
from dataclasses import dataclass

import torch

from . import blocks, state
from .forms import Form, Part, Unknown, computed, on_loan, own_method
from .probing import double, probing

# What two ways to the same output may differ by: a few roundings of the dtype, the order of the sums.
_LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1 / 64, torch.float16: 1 / 256}
_SCALES = (1.0, 16.0, 256.0)  # of usual hidden states: a limit shows beyond it
_SPREAD, _CROWD = 8, 24  # tokens of a probe for many experts, and all for the same


def find(module: torch.nn.Module) -> Form | None:
    """The form of an experts module, or of a block around experts that take no ids; None: none of these."""
    if has_tensors(module, "gate_up_proj", "down_proj") and _arguments(module) == 3:
        return STACKED
    inner = module._modules.get("mlp")
    if inner is not None and has_tensors(inner, "w1", "v1", "w2") and _arguments(module) == 3:
        return FLAT
    inner = module._modules.get("experts")
    if inner is not None and _is_adapted(inner):
        return Unknown(
            f"its experts are within a {type(inner).__name__}, an adapter's; they are served when it is merged"
        )
    if inner is not None and has_tensors(inner, "gate_up_proj", "down_proj") and _arguments(inner) == 1:
        recipe = blocks.find(module, blocks.WeightedTokens())
        return Unknown(recipe) if isinstance(recipe, str) else WeightedBlock(recipe)
    return None


def _is_adapted(module) -> bool:
    """Whether an adapter of PEFT's is around experts that take no ids."""
    inside = module
    while "base_layer" in inside._modules:
        inside = inside._modules["base_layer"]
    return inside is not module and has_tensors(inside, "gate_up_proj", "down_proj") and _arguments(inside) == 1


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
        child = module._modules[self.child]
        if not all([hasattr(child, name) for name in self.own_names]):
            return f"{self.child} is a {type(child).__name__}, which has no {' and '.join(self.own_names)}"
        within = (((self.child,), child), *state.below(child, (self.child,)))
        return state.against(module, self.names(module), within)

    def state(self, module):
        return state.taken(module, self.child)

    def names(self, module):
        return tuple([f"{self.child}.{name}" for name in self.own_names])

    def weights(self, module, names):
        child = module._modules[self.child]
        weights = tuple(map(child._parameters.get, self.own_names))
        for weight in weights:
            if weight is None:
                return tuple([computed(child, name) for name in self.own_names]), False
        return weights, not (on_loan(module) or on_loan(child))


@dataclass(frozen=True)
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
        weights, _ = self.weights(module, self.names(module))
        call = probe_call(experts, self.sizes(module, weights)["H"], *self.experts_and_identities(module))
        twin = double(module, training=True)
        return compared(
            lambda x, ids, routing: own_method(module)(twin, x, ids, routing),
            lambda x, ids, routing: self.returned(module, x, ids, routing, experts(x, ids, routing)),
            call,
        )


@dataclass(frozen=True)
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
        x = probe_tokens(experts, 2 * total, hidden)  # two tokens an expert
        ids = torch.arange(total, device=x.device).repeat_interleave(2).view(-1, 1)
        ones = torch.ones(2 * total, 1, dtype=x.dtype, device=x.device)
        twin = double(module.experts, training=True)
        own = lambda x, ids, weights: type(twin).forward(twin, x).view(x.shape)  # noqa: E731
        return compared(own, experts, (x, ids, ones))

    def changed(self, module):
        recipe = blocks.find(module, blocks.WeightedTokens())
        return None if recipe == self.recipe else blocks.CHANGED if isinstance(recipe, blocks.Recipe) else recipe


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
    x = torch.randn(tokens, hidden, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    return x.to(experts.down_proj.device, experts.down_proj.dtype)


def probe_call(experts, hidden: int, known: int, identities: int = 0) -> tuple[torch.Tensor, ...]:
    """(hidden states, ids, weights): a few tokens for many experts, and many for the first."""
    x = probe_tokens(experts, _SPREAD + _CROWD, hidden)
    ids = torch.arange(2 * len(x), device=x.device).view(-1, 2) % known
    ids[_SPREAD:] = torch.arange(2, device=x.device) % known
    if identities:
        ids[:_SPREAD:2, 1] = known + ids[:_SPREAD:2, 1] % identities
    return x, ids, torch.rand(ids.shape, generator=torch.Generator(device="cpu").manual_seed(1), device="cpu").to(x)


def compared(own, ours, call) -> tuple[str | None, bool]:
    """(the reason when two ways to the same output differ by more than roundings, whether other weights would not
    change that)."""
    x, *others = call
    with probing(x.device):
        for scale in _SCALES:
            try:
                expected, got = own(scale * x, *others), ours(scale * x, *others)
            except Exception as error:  # whatever a foreign forward raises
                return f"its own forward could not be probed ({type(error).__name__}: {error})", False
            if expected.shape != got.shape:
                shapes = f"{tuple(expected.shape)} on a probe, and the kernels {tuple(got.shape)}"
                return f"its own forward gives {shapes}", True
            if scale > 1 and not bool(expected.isfinite().all()):
                return None, False  # beyond the dtype: nothing to compare
            reason = _difference(expected.double(), got.double(), _LARGEST_DIFFERENCE[x.dtype])
            if reason is not None:
                return reason
    return None, False


def _difference(expected, got, largest: float) -> tuple[str, bool] | None:
    norm = expected.norm()
    if norm == 0:
        reason = "its own forward gives nothing but zeros on a probe (weights not loaded yet?), which shows nothing"
        return reason, False
    difference = (expected - got).norm()
    if bool(difference <= largest * norm):  # false of NaN
        return None
    settled = bool(difference > 0)
    return f"its own forward differs from the kernels' result on a probe ({difference / norm:.2g} of it)", settled


STACKED, FLAT = Stacked(), Flat()
