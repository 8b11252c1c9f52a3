"""Which gate a layer has, found by computing it.

transformers names activations in a dozen ways (a config string, a module, a plain function) and a class may override
`_apply_gate` to clamp, shift or interleave. Only the numbers say what a gate computes, so it is run once per layer on a
small grid and compared with a table of known gates, whose parameters (a limit, an alpha) are read off the grid, too. A
new gate is a row of the table; it is served as soon as `warpdecode.Experts` takes its arguments.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# Gate values: dense where the activations bend and where erf- and tanh-gelu differ most (4.7e-4 near 2.2), then sparse
# and large, because a clamp (limits of 7 and 10 are in use) shows only beyond its limit.
_NEAR = [i / 8 for i in range(-80, 81)]
_FAR = [s * m for m in (20.0, 50.0, 100.0, 1e3, 1e4, 1e5) for s in (-1.0, 1.0)]
_GATES = _NEAR + _FAR
_UPS = [-1e5, -1e3, -100.0, -12.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 12.0, 100.0, 1e3, 1e5]

# FP32 leaves at most about 2^-22 of gate times up: the worst is 1 + tanh(x) for negative x, which cancels down to the
# rounding of tanh near -1. 2^-18 leaves room for fast exponentials and for a limit read off with six digits, and is
# still a hundred times below erf- against tanh-gelu.
_TOLERANCE = 2.0**-18


class Gate(NamedTuple):
    """What a gate computes, as the arguments of `warpdecode.Experts` that mean it (None: unknown), and the reason why
    the kernels cannot serve it, None when they can."""

    arguments: dict[str, str | float] | None
    reason: str | None


class _Grid:
    """What a gate gave at each (gate, up) of the grid, in float64."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def at(self, gate: float, up: float) -> float:
        return self.values[_UPS.index(up), _GATES.index(gate)].item()


class _Known(NamedTuple):
    """A gate of the table. `parameters` reads its parameters off a grid, None when the grid cannot be this gate's;
    `compute` gives its values, and the product whose roundings bound their error."""

    arguments: dict[str, str | float]
    formula: str
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    parameters: Callable[[_Grid], dict[str, float] | None] = lambda grid: {}


def _gelu_tanh(g: torch.Tensor) -> torch.Tensor:
    return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


def _gelu(g: torch.Tensor) -> torch.Tensor:
    return 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))


def _silu(g: torch.Tensor) -> torch.Tensor:
    return g * torch.sigmoid(g)


def _relu2(g: torch.Tensor) -> torch.Tensor:
    return torch.relu(g) ** 2


# name -> (activation, what its size is measured by)
_ACTIVATIONS = {
    "silu": (_silu, torch.abs),
    "gelu_tanh": (_gelu_tanh, torch.abs),
    "gelu": (_gelu, torch.abs),
    "relu": (torch.relu, torch.abs),
    "relu2": (_relu2, torch.square),
}


def _plain(activation: Callable, size: Callable) -> Callable:
    return lambda g, u: (activation(g) * u, size(g) * u)


def _clamped(activation: Callable, size: Callable) -> Callable:
    def compute(g, u, limit):
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return activation(g) * u, size(g) * u

    return compute


def _clamped_after(activation: Callable, size: Callable) -> Callable:
    return lambda g, u, limit: (activation(g).clamp(max=limit) * u.clamp(-limit, limit), size(g) * u)


def _swish(g, u, alpha):
    return g * torch.sigmoid(alpha * g) * u, g * u


def _clamped_swiglu(g, u, alpha, limit=math.inf):
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (u + 1) * g * torch.sigmoid(alpha * g), g * (u.abs() + 1)


def _limit_of_up(grid: _Grid) -> dict[str, float] | None:
    # With an up of 1 nothing is clamped (by limits above 1), so the largest up shows the limit itself.
    one, most = grid.at(1.0, 1.0), grid.at(1.0, 1e5)
    return {"limit": _rounded(most / one)} if 0 < one < most else None


def _alpha(grid: _Grid) -> dict[str, float] | None:
    return _alpha_of(grid.at(1.0, 1.0))


def _alpha_of(swish_of_one: float) -> dict[str, float] | None:
    # swish(1) = sigmoid(alpha)
    if not 0 < swish_of_one < 1:
        return None
    return {"alpha": _rounded(math.log(swish_of_one / (1 - swish_of_one)))}


def _alpha_and_limit(grid: _Grid) -> dict[str, float] | None:
    # An up of 0 leaves gate * sigmoid(alpha * gate).
    middle, most = grid.at(1.0, 0.0), grid.at(1.0, 1e5)
    found = _alpha_of(middle)
    if found is None or not middle < most:
        return None
    limit = _rounded(most / middle - 1)
    return found if limit >= 1e5 else found | {"limit": limit}


def _rounded(value: float) -> float:
    # Configs write few digits and FP32 keeps seven: six are the number that was written.
    return float(f"{value:.6g}")


def _of_every_activation(formula: str, compute: Callable, others: dict, *parameters: Callable) -> list[_Known]:
    return [
        _Known({"activation": name} | others, formula, compute(*known), *parameters)
        for name, known in _ACTIVATIONS.items()
    ]


GATES = (
    *_of_every_activation("a(gate) * up", _plain, {}),
    _Known({"activation": "silu"}, "gate * sigmoid(alpha * gate) * up", _swish, _alpha),
    *_of_every_activation("a(min(gate, limit)) * clamp(up, -limit, limit)", _clamped, {}, _limit_of_up),
    *_of_every_activation(
        "min(a(gate), limit) * clamp(up, -limit, limit)", _clamped_after, {"clamp_after_activation": True}, _limit_of_up
    ),
    _Known(
        {"activation": "silu", "up_offset": 1.0},
        "(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)",
        _clamped_swiglu,
        _alpha_and_limit,
    ),
)


def probe_gate(compute: Callable, device: torch.device) -> Gate:
    """Runs a gate, (gates, ups) -> values, on a grid and looks it up in the table. `device` is the weights' device,
    used only when the gate does not run on the CPU (an activation that is a CUDA kernel, or has parameters)."""
    gates = torch.tensor(_GATES, dtype=torch.float32, device="cpu")
    ups = torch.tensor(_UPS, dtype=torch.float32, device="cpu")
    g, u = gates.expand(len(_UPS), -1), ups[:, None].expand(-1, len(_GATES))
    try:
        got = _run(compute, g, u)
    except Exception as cpu_error:  # whatever a foreign gate raises: it cannot be recognised
        try:
            got = _run(compute, g.to(device), u.to(device)).cpu()
        except Exception:
            return Gate(None, f"its gate could not be probed ({type(cpu_error).__name__}: {cpu_error})")
    if got.shape != g.shape:
        return Gate(None, f"its gate maps {len(_GATES)} gates and ups to {tuple(got.shape)}, not to {tuple(g.shape)}")
    return _look_up(g.double(), u.double(), got.double())


def _run(compute: Callable, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast(device_type=g.device.type, enabled=False):
        return compute(g, u).detach()


def _look_up(g: torch.Tensor, u: torch.Tensor, got: torch.Tensor) -> Gate:
    grid = _Grid(got)
    for known in GATES:
        parameters = known.parameters(grid)
        if parameters is None:
            continue
        expected, product = known.compute(g, u, **parameters)
        # NaN compares false, so a gate that yields one is never recognised.
        if bool(((got - expected).abs() <= _TOLERANCE * product.abs().clamp(min=1e-3)).all()):
            return Gate(known.arguments | parameters, None)
    formulas = "; ".join(dict.fromkeys(known.formula for known in GATES))
    return Gate(None, f"its gate computes none of the known ones: {formulas}; a is one of {', '.join(_ACTIVATIONS)}")
