"""Every notebook runs from top to bottom, in a kernel of its own, and says what it claims."""

from pathlib import Path

import pytest

import warpdecode

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def texts(cell):
    """Everything a cell printed or showed as text."""
    for output in cell.get("outputs", []):
        yield output.get("text", "") or output.get("data", {}).get("text/plain", "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code" and "def " not in cell.source)
    stored = "".join(text for cell in notebook.cells for text in texts(cell))
    outdated = [
        kernel.name for kernel in warpdecode.kernels() if kernel.name in stored and kernel.description not in stored
    ]
    assert not outdated, f"the notebook's outputs are of older kernels: run it again ({outdated})"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()  # raises where a cell raises
    shown = [text for cell in notebook.cells for text in texts(cell)]
    assert "True" in shown  # the bits of tokens alone and together
    assert not any("WRONG" in text for text in shown)
