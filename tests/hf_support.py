"""What becomes of each of transformers' experts classes: served by the kernels, or handed back with a reason; each
checked against its own eager path. `python tests/hf_support.py` prints the support table of README.md."""

import re
import textwrap
import warnings
from dataclasses import dataclass

import torch
import transformers
from transformers.integrations.moe import _default_apply_gate

import cases
import hf_families
import hf_models
import warpdecode.hf

# Eager rounds each of some eight values where the kernels round one: far below what another gate or layout would make.
EAGER_ROUNDINGS = 8

_STANDARD = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_ACTIVATIONS = (torch.nn.functional.silu, lambda g: torch.nn.functional.gelu(g, approximate="tanh"))


@dataclass(frozen=True)
class Verdict:
    """What the kernels do with one family's experts; `reason` is None when they serve them."""

    family: hf_families.Family
    reason: str | None


def must_be_served(module: torch.nn.Module) -> bool:
    """Whether this is the standard layout with silu or gelu_tanh, told without asking the code under test."""
    if any(getattr(module, name, value) != value for name, value in _STANDARD.items()):
        return False
    if type(module)._apply_gate is not _default_apply_gate:
        return False
    gate = torch.linspace(-6, 6, 97)
    return any(torch.allclose(module.act_fn(gate), known(gate), rtol=1e-5, atol=1e-6) for known in _ACTIVATIONS)


def check(family: hf_families.Family, dtype: torch.dtype, device: str) -> Verdict:
    """Runs the family's experts through a patch and asserts that the outcome is right, whichever it is."""
    seed = sum(map(ord, str(family)))
    eager = hf_families.build(family, seed=seed).to(device, dtype)
    ours = hf_families.build(family, seed=seed).to(device, dtype)
    hidden, ids, weights = (t.to(device) for t in hf_families.inputs(seed=seed + 1))
    inputs = hidden.to(dtype), ids, weights.to(dtype)
    expected = eager(*inputs)
    reason = _patch(ours)
    with hf_models.counted_kernel_calls() as served:
        got = ours(*inputs)
    assert got.dtype == dtype and got.shape == expected.shape and torch.isfinite(got).all()
    if reason is not None:
        assert not served and torch.equal(got, expected), f"handed back, but not eager's output: {reason}"
        return Verdict(family, reason)
    assert served == [hidden.shape[0]]
    exact = eager.double()(inputs[0].double(), ids, inputs[2].double()).cpu()
    bound = cases.error_bound(exact, dtype)
    assert cases.relative_error(got, exact) <= bound
    assert cases.relative_error(expected, exact) <= EAGER_ROUNDINGS * bound, "eager computes something else"
    return Verdict(family, None)


def _patch(module: torch.nn.Module) -> str | None:
    """Patches, and returns the reason when the module is handed back: the one that is said, raised and explained."""
    (row,) = warpdecode.hf.explain(module)
    if row.reason == "it is not patched; the kernels can serve it":
        warpdecode.hf.patch(module, strict=True)
        return None
    try:
        warpdecode.hf.patch(module, strict=True)
    except warpdecode.hf.WarpDecodeFallbackError as error:
        assert row.reason in str(error)
    else:
        raise AssertionError(f"strict=True took a layer that explain() hands back: {row.reason}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warpdecode.hf.patch(module)
    assert len(said) == 1 and row.reason in str(said[0].message)
    return row.reason


def verdicts(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> list[Verdict]:
    """Every family of the installed transformers, checked."""
    return [check(family, dtype, device) for family in hf_families.families()]


def table(found: list[Verdict]) -> str:
    """README's support table."""
    served = [v.family.name for v in found if v.reason is None]
    by_reason: dict[str, list[str]] = {}
    for v in found:
        if v.reason is not None:
            by_reason.setdefault(_cell(v.reason), []).append(v.family.name)
    return "\n".join([
        f"Of the {len(found)} expert classes of transformers {transformers.__version__}, {len(served)} are served:",
        *textwrap.wrap(", ".join(dict.fromkeys(served)) + ".", 120),
        "",
        "| handed back | reason |",
        "|:--|:--|",
        *(f"| {', '.join(names)} | {reason} |" for reason, names in sorted(by_reason.items())),
    ])  # fmt: skip


def _cell(reason: str) -> str:
    # The list of known gates is for the reader of a warning.
    return reason.split(": a(gate)", maxsplit=1)[0].replace("|", "\\|")


def read(text: str) -> tuple[str, dict[str, str]]:
    """(version, what becomes of each family) of a table that `table` made."""
    version, served = re.search(r"of transformers (\S+), \d+ are served:\n(.*?)\.\n", text, re.S).groups()
    found = dict.fromkeys(served.replace("\n", " ").split(", "), "served")
    for names, reason in re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)[1:]:
        found |= dict.fromkeys(names.split(", "), reason)
    return version, found


if __name__ == "__main__":
    print(table(verdicts()))
