"""A finding as text."""

from __future__ import annotations

from fusion_compile.passes import KINDS, Finding


def test_a_finding_names_line_operator_reason_and_remedy() -> None:
    found = Finding("host_sync", "aten.nonzero.default", "model.py:7", "The host waits.", "Use torch.where.")
    assert str(found) == "model.py:7: aten.nonzero.default (host_sync): The host waits. Use torch.where."
    assert found.kind in KINDS and found.severity == "error"


def test_a_finding_without_a_line_says_so() -> None:
    assert str(Finding("recompile", "forward", "", "Why.", "Do.")).startswith("unknown line: forward (recompile)")
