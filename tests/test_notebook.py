"""What notebooks show: one output that keeps its lines, where everything went, and a bar of text."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._notebook import preformatted, table
from fusion_compile._progress import following, stage


@pytest.fixture
def jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: consoles believe that they are in one, and to display an output of their own fails."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)

    def shown(*_: object) -> None:
        raise AssertionError("rich displayed an output of its own")

    monkeypatch.setattr("rich.jupyter.display", shown)
    monkeypatch.delenv("FUSION_COMPILE_PROGRESS", raising=False)
    assert Console().is_jupyter


def test_text_keeps_its_lines_and_is_no_markup() -> None:
    assert preformatted("a < b\n  c").endswith(">a &lt; b\n  c</pre>")
    shown = table(("name", "role"), [("0.weight", "<x>")], "one & two")
    assert "<p>one &amp; two</p>" in shown and "&lt;x&gt;</td>" in shown and shown.count("<tr>") == 2


@pytest.mark.usefixtures("jupyter")
def test_an_explanation_is_one_output_and_so_is_its_print(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = fc.explain(nn.ReLU(), (torch.ones(3),), run=False)
    assert explanation._repr_html_() == preformatted(str(explanation))
    assert explanation.diff(explanation)._repr_html_().startswith("<pre")
    print(explanation)
    explanation.print()
    assert capsys.readouterr().out.count("ReLU, 1 graph") == 2


def test_a_step_says_where_each_parameter_went() -> None:
    step = fc.compile_training_step(nn.Linear(4, 2), lambda m, x: m(x).square().mean(), mode="eager")
    shown = step._repr_html_()
    assert "TrainingStep(sf_normuon" in shown and ">weight</td>" in shown and ">scalar</td>" in shown


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.time(t[:, None])


def test_a_sampler_says_what_was_hoisted() -> None:
    sampler = fc.optimize_sampler(Timed().eval(), 2, mode="eager", example_inputs=(torch.zeros(2, 3), torch.ones(2)))
    assert "hoisted" in sampler._repr_html_() and sampler._repr_html_() == sampler.report._repr_html_()


@pytest.mark.usefixtures("jupyter")
def test_progress_is_a_line_that_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("compiling"):
        pass
    assert list(following("ab", 2, "evaluating")) == ["a", "b"]
    assert list(following("ab", None, "evaluating")) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == "" and "\rfusion_compile: compiling: 0.0 s\n" in err
    assert "\rfusion_compile: evaluating: 2 of 2 [####################]\n" in err
    assert err.endswith("\rfusion_compile: evaluating: 2\n")
