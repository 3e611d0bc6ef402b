"""The notebook runs from top to bottom on real pictures, with the library's public names alone."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "coursework.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the kernel's own libraries warn about the event loop
@pytest.mark.usefixtures("no_cifar10")
def test_coursework_notebook(monkeypatch, tmp_path):
    monkeypatch.setenv("EPOCHS", "3")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    accuracy = re.search(r"Test accuracy: ([\d.]+)% of 3\d\d images", text)
    assert accuracy, text
    assert float(accuracy[1]) > 50  # ten classes: chance is 10
    assert re.search(r"^Epoch \[3/3\], Training Loss: \d\.\d{4}, ", text, re.MULTILINE)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
