"""README's figures are those of the committed result files, and what it names exists."""

import re
from pathlib import Path

import pytest

from warpdecode.bench.report import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_come_from_result_files():
    numbers = re.search(r"<!-- figures -->\n(.*?)\n<!-- end of figures -->", README, re.S).group(1)
    assert numbers.strip() == report(ROOT / "notebooks" / "results", short=True).strip(), (
        "run `python -m warpdecode.bench.report notebooks/results --short` and put what it prints between the markers"
    )


def test_all_tables_lie_beside_the_result_files():
    results = ROOT / "notebooks" / "results"
    tables = (results / "README.md").read_text(encoding="utf-8")
    assert tables.endswith("\n" + report(results) + "\n"), (
        "put what `python -m warpdecode.bench.report notebooks/results` prints behind the first paragraph of "
        "notebooks/results/README.md"
    )


@pytest.mark.parametrize("path", re.findall(r"`((?:src|cuda|tests|python|notebooks)/[\w./]*)`", README))
def test_named_paths_exist(path):
    assert (ROOT / path).exists()


def test_the_extra_hf_brings_what_the_ten_lines_need():
    (lines,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", README, re.S)
    (extra,) = re.findall(r"^hf = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    needed = {"import torch": "torch", "from transformers": "transformers", "device_map=": "accelerate"}
    for text, package in needed.items():
        assert text in lines and f'"{package}' in extra


def test_first_command_is_one_line_of_shell():
    first = re.search(r"<!-- first command -->\n```sh\n(.*?)\n```", README, re.S).group(1)
    assert first.endswith("warpdecode generate") and "\n" not in first
