"""The example notebook runs from its first cell to its last, and each cell shows one output."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "digits.ipynb"


@pytest.mark.exhaustive  # a kernel of its own, and three programs that Inductor compiles: 30 s on a busy machine
def test_it_runs_learns_and_shows_what_it_should() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    results = [output for outputs in shown for output in outputs if output.output_type == "execute_result"]
    assert len(results) == len(shown), "each cell shows its last expression once"
    text = "\n".join(str(output.data) for output in results)
    first, last = map(float, re.findall(r"'loss ([\d.]+) -> ([\d.]+)'", text)[0])
    assert last < 0.8 * first  # of single batches, whose noise alone costs a half
    found = re.search(r"(\d+) of 10 samples", text)
    assert found is not None and int(found[1]) >= 5  # of noise, one
    tables = [output.data["text/html"] for output in results if "text/html" in output.data]
    assert "TrainingStep(adamw" in tables[0] and "hoisted" in tables[1] and "captured" in tables[2]
