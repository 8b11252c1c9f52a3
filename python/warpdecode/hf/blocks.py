"""What a block does around its experts: it routes, calls them, adds shared experts.

Where the routing and the loop over the experts are one function, the routing has to be written again. Each way is a
row of a table, and a block's way is found, not guessed from its name: the block's own forward runs on a probe with
experts that say who they are and how they were weighted, and the way that gives the same bits is the block's.
"""

import sys
from typing import NamedTuple

import torch
from torch.nn import functional

from .forms import ABSENT, own_method
from .probing import changed, double, noted, probing

CHANGED = "it routes, or adds to its experts, otherwise than when it was patched; patch it again"
TRAINS = "its block does something else in training mode; patch it in eval mode"
BESIDES = "its forward does something besides: it changes {}, which the kernels would not"


class Recipe(NamedTuple):
    """One block's way: names of `ROUTINGS` and `SHARED`, the router's name and whether it takes [B, S, H], whether the
    router's logits are returned, too, and whether the output keeps the shape [T, H]."""

    routing: str
    router: str
    unflattened: bool
    shared: str
    logits: bool
    flat: bool


def _softmax(module, router, tokens, dtype, normalised):
    logits = router(tokens)
    weights = functional.softmax(logits, dim=1, dtype=torch.float)
    weights, ids = torch.topk(weights, module.top_k, dim=-1)
    if normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, ids, weights.to(dtype)


def _softmax_by_flag(module, router, tokens, dtype):
    return _softmax(module, router, tokens, dtype, module.norm_topk_prob)


def _softmax_normalised(module, router, tokens, dtype):
    return _softmax(module, router, tokens, dtype, True)


def _softmax_plain(module, router, tokens, dtype):
    return _softmax(module, router, tokens, dtype, False)


def _softmax_corrected(module, router, tokens, dtype):
    # Chosen by the corrected probabilities, weighted by the others; in float32 whatever autocast says.
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        logits = router(tokens.float())
        probabilities = functional.softmax(logits, dim=1, dtype=torch.float)
        _, ids = torch.topk(module.moe_statics(probabilities), module.top_k, dim=-1)
        weights = torch.gather(probabilities, dim=-1, index=ids)
        weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=module.norm_min)
    return logits, ids, weights.to(dtype)


def _sparsemixer(module, router, tokens, dtype):
    logits = router(tokens)
    own = sys.modules[type(module).__module__].sparsemixer
    weights, ids = own(logits, jitter_eps=module.router_jitter_noise, training=module.training)
    return logits, ids, weights


def _scores(module, router, tokens, dtype):
    # A score for every expert, 0 where it was not chosen.
    scores, logits = router(tokens)
    ids = torch.topk(logits, module.top_k, dim=1).indices
    return logits, ids, scores.gather(1, ids)


# name -> (what the block must have, (module, router, tokens, their dtype) -> (logits, ids, weights))
ROUTINGS = {
    "softmax by flag": (("norm_topk_prob",), _softmax_by_flag),
    "softmax corrected": (("moe_statics", "norm_min"), _softmax_corrected),
    "sparsemixer": (("router_jitter_noise",), _sparsemixer),
    "softmax normalised": ((), _softmax_normalised),
    "softmax": ((), _softmax_plain),
    "scores": ((), _scores),
}


def _gated_shared(module, tokens, out):
    return out + functional.sigmoid(module.shared_expert_gate(tokens)) * module.shared_expert(tokens)


# name -> (what the block must have, (module, tokens, routed output) -> output)
SHARED = {
    "gated": (("shared_expert", "shared_expert_gate"), _gated_shared),
    "shared_expert": (("shared_expert",), lambda module, tokens, out: out + module.shared_expert(tokens)),
    "shared_experts": (("shared_experts",), lambda module, tokens, out: out + module.shared_experts(tokens)),
    "shared_mlp": (("shared_mlp",), lambda module, tokens, out: out + module.shared_mlp(tokens)),
    "none": ((), lambda module, tokens, out: out),
}
_ROUTERS = ("gate", "router")
_NOISES = ("jitter_noise", "input_jitter_noise")


def follow(recipe: Recipe, module, hidden_states, experts):
    """The block's forward; `experts` are called with (hidden states [T, H], ids, weights)."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    router = module._modules[recipe.router]
    asked = hidden_states if recipe.unflattened else tokens
    logits, ids, weights = ROUTINGS[recipe.routing][1](module, router, asked, tokens.dtype)
    out = SHARED[recipe.shared][1](module, tokens, experts(tokens, ids, weights))
    out = out if recipe.flat else out.view(hidden_states.shape)
    return (out, logits) if recipe.logits else out


def noise_against(module) -> str | None:
    """The reason in training mode when the block multiplies its input by noise there."""
    if module.training:
        for name in _NOISES:
            if getattr(module, name, 0):
                return f"it adds noise to its input in training mode ({name}={getattr(module, name)})"
    return None


class _UnitExpert(torch.nn.Module):
    """Answers every token with a unit vector of its own."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, tokens):
        out = torch.zeros_like(tokens)
        out[:, self.number % tokens.shape[1]] = 1
        return out


class SeparateModules:
    """Stand-ins for one module an expert, and what a block's sum over them is."""

    def put_in(self, experts):
        return torch.nn.ModuleList([_UnitExpert(i) for i in range(len(experts))])

    def routed(self, tokens, ids, weights):
        out = torch.zeros(tokens.shape, dtype=weights.dtype, device=tokens.device)
        return out.scatter_add(1, ids % tokens.shape[1], weights).to(tokens.dtype)


class WeightedTokens:
    """The same for one module that takes every token once an expert, weighted: it answers with the token's first
    number in its unit vector."""

    class _Experts(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, tokens):
            first = tokens.view(self.number, -1, tokens.shape[-1])[..., :1]
            own = torch.arange(self.number, device=tokens.device) % tokens.shape[-1]
            units = functional.one_hot(own, tokens.shape[-1]).to(tokens.dtype)
            return (first * units[:, None]).view(tokens.shape)

    def put_in(self, experts):
        return self._Experts(experts.gate_up_proj.shape[0])

    def routed(self, tokens, ids, weights):
        return torch.zeros_like(tokens).scatter_add(1, ids % tokens.shape[1], tokens[:, :1] * weights)


def probe(module) -> torch.Tensor | str:
    """Hidden states [2, 48, H] of three sizes for a block, or the reason why there are none."""
    router = next((module._modules[name] for name in _ROUTERS if module._modules.get(name) is not None), None)
    matrix = None if router is None else next((p for p in router.parameters() if p.dim() == 2), None)
    first = next(module._modules["experts"].parameters(), None)
    if matrix is None or first is None:
        return "its block has no router that is known"
    if "meta" in (matrix.device.type, first.device.type):
        return f"its block is {ABSENT}, and cannot be probed there"
    x = torch.randn(2, 48, matrix.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x[:, ::3] *= 1e-3  # nearly equal probabilities, whose sum over the chosen is far from 1
    x[:, 1::3] *= 0.1
    x[:, 24:] = x[:, 24:25]  # a crowd for the same experts: a capacity shows
    return x.to(matrix.device, first.dtype)


def find(module, stand_ins) -> Recipe | str:
    """The block's way, or the reason why there is none."""
    hidden_states = probe(module)
    if isinstance(hidden_states, str):
        return hidden_states
    with probing(hidden_states.device):
        twin = double(module, experts=stand_ins.put_in(module._modules["experts"]))
        before = noted(twin)
        try:
            expected = own_method(module)(twin, hidden_states.clone())
        except Exception as error:  # whatever a foreign forward raises
            return f"its block could not be probed ({type(error).__name__}: {error})"
        left = changed(before)
        if left is not None:
            return BESIDES.format(left)
        logits = isinstance(expected, tuple)
        flat = isinstance(expected[0] if logits else expected, torch.Tensor) and _dims(expected) == 2
        for recipe in _candidates(module, logits, flat):
            if _is_followed(recipe, twin, hidden_states, stand_ins, expected):
                return recipe if _trains_so(recipe, module, hidden_states, stand_ins) else TRAINS
    return "its block routes in none of the known ways, or does something besides"


def _is_followed(recipe, twin, hidden_states, stand_ins, expected) -> bool:
    try:
        return _equal(follow(recipe, twin, hidden_states, stand_ins.routed), expected)
    except Exception:  # a way that is not this block's
        return False


def _trains_so(recipe, module, hidden_states, stand_ins) -> bool:
    """Whether the way is also that of training mode, where the module is in it: dropout is not."""
    if not module.training or noise_against(module):  # noise is asked for at each call
        return True
    twin = double(module, training=True, experts=stand_ins.put_in(module._modules["experts"]))
    torch.manual_seed(0)
    expected = own_method(module)(twin, hidden_states.clone())
    torch.manual_seed(0)
    return _is_followed(recipe, twin, hidden_states, stand_ins, expected)


def _dims(result) -> int:
    return (result[0] if isinstance(result, tuple) else result).dim()


def _candidates(module, logits: bool, flat: bool):
    for routing, (needs, _) in ROUTINGS.items():
        for shared, (needs_shared, _) in SHARED.items():
            if not all(getattr(module, name, None) is not None for name in (*needs, *needs_shared)):
                continue
            for router in _ROUTERS:
                if module._modules.get(router) is not None:
                    for unflattened in (False, True):
                        yield Recipe(routing, router, unflattened, shared, logits, flat)


def _equal(got, expected) -> bool:
    if isinstance(expected, tuple):
        return isinstance(got, tuple) and len(got) == len(expected) and all(map(_equal, got, expected))
    return got.shape == expected.shape and got.dtype == expected.dtype and torch.equal(got, expected)
