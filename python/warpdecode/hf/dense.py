"""The form of experts that take a weight for every expert, not for the chosen ones alone: gpt-oss and Qwen3-VL-MoE of
transformers 4.57. Told by the names of what they take; their own forward is then run on a probe, as in `stacked.py`."""

import inspect
from dataclasses import dataclass

import torch

from .forms import Part, own_method
from .probing import double
from .stacked import Stacked, compared, has_tensors, probe_call

_TAKEN = {"router_indices", "routing_weights"}
_BIASES = ("gate_up_proj_bias", "down_proj_bias")


def find(module: torch.nn.Module) -> "Dense | None":
    """The form, where the module is such experts."""
    if has_tensors(module, "gate_up_proj", "down_proj"):
        names = list(inspect.signature(type(module).forward).parameters)[2:]
        if set(names) == _TAKEN:
            return DENSE
    return None


@dataclass(frozen=True)
class Dense(Stacked):
    """`gate_up_proj`, `down_proj`, perhaps biases of both. Without an `act_fn` they have an `alpha` and a `limit`, and
    interleaved columns: gpt-oss."""

    takes_all_weights = True

    def names(self, module):
        return (*super().names(module), *[name for name in _BIASES if getattr(module, name, None) is not None])

    def parts(self, module):
        biases = len(self.names(module)) > 2
        more = (Part("gate_up_bias", 2), Part("down_bias", 3)) if biases else ()
        return (*super().parts(module), *more)

    def arguments(self, module):
        return super().arguments(module) | ({} if hasattr(module, "act_fn") else {"is_interleaved": True})

    def sizes(self, module, weights):
        return super().sizes(module, weights[:2])

    def gate(self, module):
        if hasattr(module, "act_fn"):
            return super().gate(module)
        alpha, limit = module.alpha, module.limit

        def swiglu(g, u):
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            return (u + 1) * g * torch.sigmoid(alpha * g)

        return swiglu

    def call(self, hidden_states, *others, **named):
        """(tokens, ids, their weights) of what the module is called with."""
        routing = (*others, *named.values())
        first_has_ids = not routing[0].is_floating_point()
        ids, weights = routing if first_has_ids else routing[::-1]
        # An id beyond the experts is expert parallelism's mark for another process's, and has no weight here.
        chosen = weights.gather(1, ids.clamp(max=weights.shape[1] - 1))
        return hidden_states.reshape(-1, hidden_states.shape[-1]), ids, chosen

    def returned(self, module, hidden_states, ids, weights, out):
        return out.view(hidden_states.shape[0], -1, hidden_states.shape[-1])

    def difference(self, module, experts):
        sizes = self.sizes(module, self.weights(module, self.names(module))[0])
        x, ids, chosen = probe_call(experts, sizes["H"], sizes["E"])
        dense = torch.zeros(len(x), sizes["E"], dtype=x.dtype, device=x.device).scatter_(1, ids, chosen)
        twin = double(module, training=True)
        own = lambda x, ids, _: own_method(module)(  # noqa: E731
            twin, x[None], router_indices=ids, routing_weights=dense
        )
        return compared(own, lambda *call: experts(*call)[None], (x, ids, chosen))


DENSE = Dense()
