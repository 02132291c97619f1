"""What people do in notebooks, in a real kernel: run a cell again, interrupt one, edit a class and go on."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient

SET_UP = """\
import os, signal, threading
os.environ["FUSION_COMPILE_PROGRESS"] = "0"
import torch, fusion_compile as fc
from torch import nn

torch.manual_seed(0)
x = torch.randn(8, 4)

def loss(model, x):
    return model(x).square().mean()

def interrupt_soon():
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()"""
CLASS = """\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
    def forward(self, x):
        return {scale} * self.a(x)"""
MADE = "step = fc.compile_training_step(model, loss, optimizer='adamw', {options})"
GO_ON = """\
interrupt_soon()
while True:
    step(x)"""
WHOLE = """\
taken = step.steps_called
twin = Net()
twin.load_state_dict(start)
again = fc.compile_training_step(twin, loss, optimizer='adamw', mode='eager')
for _ in range(taken):
    again(x)
pairs = zip(model.parameters(), twin.parameters())
furthest = max(float((a - b).detach().abs().max()) for a, b in pairs)
print(taken > 2, furthest < 1e-5)  # a captured step rounds otherwise; a missing step is far more"""
RATIO = """\
with torch.no_grad():
    value = model(x).square().mean()
print(round(float(step(x) / value), 3))"""


def outputs(cells: list[str]) -> list[str]:
    """What each cell printed, or the error that it ended with."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True).execute()
    said = []
    for cell in notebook.cells:
        texts = [f"{o.ename}: {o.evalue}" if o.output_type == "error" else o.get("text", "") for o in cell.outputs]
        said.append("".join(texts).strip())
    return said


@pytest.mark.exhaustive  # a kernel of its own, 8 s of a core
@pytest.mark.parametrize("options", ["mode='eager'", "backend='aot_eager'"])
def test_a_cell_is_run_again_interrupted_and_a_class_edited(options: str) -> None:
    made, kept = MADE.format(options=options), "start = {n: p.clone() for n, p in model.state_dict().items()}"
    cells = [
        SET_UP,
        CLASS.format(scale=1),
        f"model = Net()\n{kept}\n{made}\nfirst = step\nstep(x); step(x); print(step.steps_called)",
        f"{kept}\n{made}\nstep(x); step(x); print(step.steps_called)",  # the cell again, on the same model
        "first(x)",
        GO_ON,
        WHOLE,
        RATIO,
        CLASS.format(scale=3),
        RATIO,  # the object that was made before is of the old class, for Python and for the step
        f"model = Net()\n{made}\n{RATIO}",
        "Net.forward = lambda self, x: 5 * self.a(x)\n" + RATIO,  # what %autoreload does to a class
    ]
    said = outputs(cells)
    assert said[:4] == ["", "", "2", "2"]
    assert said[4].startswith("RuntimeError: a.weight [4, 4] was rebound") and "a later step of the same" in said[4]
    assert said[5] == "KeyboardInterrupt:"
    assert said[6] == "True True", "the step that was under way when the interrupt came is whole or not taken"
    assert said[7:11] == ["1.0", "", "1.0", "1.0"]
    if options.startswith("mode"):
        assert said[11] == "1.0", "nothing was captured, so the new forward runs"
    else:
        assert re.search(r"RuntimeError: Net.forward was .*compile the step again", said[11])
