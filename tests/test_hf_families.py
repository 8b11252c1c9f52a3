"""Every experts class of the installed transformers, by itself, against its own eager path: served, or handed back."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import hf_families
import hf_support

FAMILIES = hf_families.families()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_it_is_served_or_handed_back_with_a_reason(family, dtype, device, record_property):
    verdict = hf_support.check(family, dtype, device)
    record_property("verdict", (family.name, verdict.reason))  # the terminal summary lists them
    if hf_support.must_be_served(hf_families.build(family)) and (device, dtype) != ("cuda", torch.float32):
        assert verdict.reason is None


def test_there_are_such_classes():
    # Both a lower bound of the search and, with 5.17, the number that it had: a search that finds little passes all.
    assert len(FAMILIES) >= 55
    assert sum(hf_support.must_be_served(hf_families.build(family)) for family in FAMILIES) >= 45


def test_readme_s_table_is_what_is_found():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    written = re.search(r"<!-- support -->\n(.*?)\n<!-- end of support -->", readme, re.S).group(1)
    found = hf_support.table(hf_support.verdicts())
    version, families = hf_support.read(written)
    if version == transformers.__version__:
        assert written == found, "run `python tests/hf_support.py` and put what it prints between the markers"
    # Another release has other families; those of both are treated alike.
    _, installed = hf_support.read(found)
    assert len(families.keys() & installed.keys()) >= 50
    for name in families.keys() & installed.keys():
        assert families[name] == installed[name]
