"""An explanation as text."""

from __future__ import annotations

import pytest
import torch

import fusion_compile as fc
from fusion_compile.passes import Finding


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


def test_no_findings_of_nothing_are_no_good_news() -> None:
    said = str(fc.explain(lambda x: None, (torch.ones(2),), run=False))
    assert "No findings, and nothing was captured in which there could be some." in said
    assert "Dynamo captured no graph: it met no operator." in said
