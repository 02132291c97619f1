"""An explanation as text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusion_compile as fc
from fusion_compile.passes import Finding


@pytest.fixture(scope="module")
def explanation() -> fc.Explanation:
    """Of a program that breaks, so that nothing in it is empty."""

    def program(x: Tensor, scale: float) -> Tensor:
        x.add_(1)
        if x.sum() > 0:
            x = x * scale
        return torch.linalg.eigh(x @ x.T)[0]

    return fc.explain(program, (torch.ones(3, 3), 2.0), backend="eager")


def test_text_has_no_colour_and_names_each_finding(
    explanation: fc.Explanation, capsys: pytest.CaptureFixture[str]
) -> None:
    explanation.print()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for finding in explanation.findings:
        assert isinstance(finding, Finding)
        assert f"({finding.kind})" in out and finding.kind in str(explanation)
    assert "Costs of graph 0" in out and "peak" in out
