"""Which activation a layer's gate computes, found by computing it.

transformers names activations in a dozen ways (a config string, a module, a plain function) and a class may override
`_apply_gate` to clamp, shift or interleave. Only the numbers say whether the kernels would compute the same, so the
gate is run once per layer on a small grid and compared with the two activations the kernels have.
"""

import math
from typing import NamedTuple

import torch

# Gate values: dense where the activations bend and where erf- and tanh-gelu differ most (4.7e-4 near 2.2), then sparse
# and large, because a clamp (limits of 7 and 10 are in use) shows only beyond its limit.
_NEAR = [i / 8 for i in range(-80, 81)]
_FAR = [s * m for m in (20.0, 50.0, 100.0, 1e3, 1e4, 1e5) for s in (-1.0, 1.0)]
_GATES = _NEAR + _FAR
_UPS = [-1e5, -1e3, -100.0, -12.0, -1.0, -0.25, 0.5, 3.0, 12.0, 100.0, 1e3, 1e5]

# FP32 leaves at most about 2^-22 |g u|: the worst is 1 + tanh(x) for negative x, which cancels down to the rounding of
# tanh near -1. 2^-18 leaves room for fast exponentials and is still a hundred times below erf- against tanh-gelu.
_TOLERANCE = 2.0**-18


class Gate(NamedTuple):
    """What a gate computes: `activation` for `warpdecode.Experts`, or None and the reason."""

    activation: str | None
    reason: str | None


def _silu(g: torch.Tensor) -> torch.Tensor:
    return g * torch.sigmoid(g)


def _gelu_tanh(g: torch.Tensor) -> torch.Tensor:
    return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def probe_gate(module: torch.nn.Module, device: torch.device) -> Gate:
    """Runs `module._apply_gate` on a grid and names the activation. `device` is the weights' device, used only when the
    gate does not run on the CPU (an activation that is a CUDA kernel, or has parameters)."""
    gates = torch.tensor(_GATES, dtype=torch.float32, device="cpu")
    ups = torch.tensor(_UPS, dtype=torch.float32, device="cpu")
    g, u = gates.expand(len(_UPS), -1), ups[:, None].expand(-1, len(_GATES))
    gate_up = torch.cat([g, u], dim=-1)
    try:
        got = _run(module, gate_up)
    except Exception as cpu_error:  # whatever a foreign gate raises: it cannot be recognised
        try:
            got = _run(module, gate_up.to(device)).cpu()
        except Exception:
            return Gate(None, f"its gate could not be probed ({type(cpu_error).__name__}: {cpu_error})")
    if got.shape != g.shape:
        return Gate(None, f"its gate maps {tuple(gate_up.shape)} to {tuple(got.shape)}, not to {tuple(g.shape)}")
    g64, u64, got64 = g.double(), u.double(), got.double()
    for name, activation in _ACTIVATIONS.items():
        error = (got64 - activation(g64) * u64).abs()
        # NaN compares false, so a gate that yields one is never recognised.
        if bool((error <= _TOLERANCE * (g64.abs() * u64.abs()).clamp(min=1e-3)).all()):
            return Gate(name, None)
    return Gate(None, "its gate computes neither silu(gate) * up nor gelu_tanh(gate) * up")


def _run(module: torch.nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast(device_type=gate_up.device.type, enabled=False):
        return module._apply_gate(gate_up).detach()
