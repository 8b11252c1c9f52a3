"""Which path each Mixture-of-Experts layer of a model takes, and why, as a table for people."""

import html
from dataclasses import astuple, dataclass, fields

import torch

from . import decode
from .config import NAME, PatchedConfig, asked_for
from .forms import ABSENT, Form, is_dispatched, on_loan
from .forward import own_path_name
from .found import moe_modules
from .layer import look_at, weights_between_calls
from .replaced import forward_against, is_replaced
from .state import SLOT, holds


@dataclass(frozen=True)
class LayerRow:
    """One Mixture-of-Experts layer. E, H and I (experts, hidden and intermediate size) come from the weights, which
    hold this process's part under tensor or expert parallelism; None where the layout is not known."""

    name: str
    module_class: str
    E: int | None
    H: int | None
    I: int | None  # noqa: E741 - the letter of the kernels' documentation
    dtype: str
    device: str
    path: str
    reason: str


class Explanation(list):
    """The rows of `explain`, one `LayerRow` per layer; prints as a table in which equal layers are folded."""

    def folded(self) -> list[tuple[str, ...]]:
        """The table's rows as text, layers that differ in nothing but their name folded into one."""
        groups: dict[tuple, list[str]] = {}
        for row in self:
            name, *rest = astuple(row)
            groups.setdefault(tuple(rest), []).append(name)
        return [
            (_fold(names), rest[0], *("?" if cell is None else str(cell) for cell in rest[1:]))
            for rest, names in groups.items()
        ]

    def __str__(self) -> str:
        if not self:
            return "No Mixture-of-Experts layers."
        header = [field.name.replace("module_class", "class").replace("name", "layers") for field in fields(LayerRow)]
        rows = [header, *self.folded()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        # The last column is a sentence: no padding, so that lines end where the text does.
        lines = ["  ".join([*(row[i].ljust(width) for i, width in enumerate(widths)), row[-1]]) for row in rows]
        served = sum(row.path == NAME for row in self)
        return "\n".join([*lines, f"{served} of {len(self)} layers take {NAME}."])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{field.name}</th>" for field in fields(LayerRow))
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
            for row in self.folded()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def explain(model: torch.nn.Module) -> Explanation:
    """Lists the path of every Mixture-of-Experts layer of `model` in a call that needs no gradients, such as those of
    `generate()`, with the reason. Changes nothing. What only a call can tell (autocast, torch.export, the inputs'
    dtype) is said by the call."""
    return Explanation(_row(*found) for found in moe_modules(model))


def _row(name: str, module: torch.nn.Module, form: Form) -> LayerRow:
    weights, _ = weights_between_calls(module, form)
    some = next((w for w in (*weights, next(module.parameters(), None)) if w is not None), None)
    path, reason = _verdict(module, form, weights)
    return LayerRow(
        name=name or "(the module itself)",
        module_class=type(module).__name__,
        **form.sizes(module, weights),
        dtype="?" if some is None else str(some.dtype).removeprefix("torch."),
        device="?" if some is None else str(some.device),
        path=path,
        reason=reason,
    )


def _verdict(module, form, weights) -> tuple[str, str]:
    own = own_path_name(module)
    against, absent = _against(module, form)
    against = against or forward_against(module)
    if against is not None:
        return own, against
    if is_replaced(module):
        how = "patched"
    elif not is_dispatched(module):
        return own, f"it is not patched{absent or '; the kernels can serve it'}"
    elif asked_for(module):
        how = "patched" if type(module.config) is PatchedConfig else "asked for by name"
    elif decode.is_on() is None:
        return own, f"it is not patched{absent or '; the kernels can serve it'}"
    elif decode.is_hidden():
        return own, "accelerate_decode() is on, but ALL_EXPERTS_FUNCTIONS has another batched_mm set on itself"
    elif own == decode.REPLACED:
        how = f"accelerate_decode() takes the place of {own}"
    else:
        return own, f"accelerate_decode() takes the place of {decode.REPLACED}, to which generate() may switch it"
    if any(weight.requires_grad for weight in weights):
        how += f"; calls with grad mode on take {own}, because the weights require grad"
    return NAME, how + absent


def _against(module, form) -> tuple[str | None, str]:
    """(why the kernels cannot serve the module, what to say of weights that a hook brings for a call)."""
    reason = look_at(module, form)[0].reason
    if reason is None or not (reason.endswith(ABSENT) and on_loan(module)):
        return reason, ""
    seen = module.__dict__.get(SLOT)  # by a call, when the weights were there; by patch(), as they are now
    if seen is None or not holds(seen.state, module) or (seen.reason is not None and seen.reason.endswith(ABSENT)):
        return None, "; offloaded: looked at when a call brings its weights"
    return seen.reason, "; offloaded: a call brings its weights"


def _fold(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    # Names that differ in one number: "model.layers.{0..47}.mlp.experts"; anything else: the first, and how many more.
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) == 1:
        varying = [i for i, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
        if len(varying) == 1 and all(parts[varying[0]].isdigit() for parts in split):
            numbers = sorted(int(parts[varying[0]]) for parts in split)
            parts = list(split[0])
            parts[varying[0]] = "{" + _ranges(numbers) + "}"
            return f"{'.'.join(parts)} ({len(names)})"
    return f"{names[0]} and {len(names) - 1} more"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
