"""One rule says when two findings are about the same thing."""

from __future__ import annotations

import dataclasses

from fusion_compile.explain._findings import deduplicate, identity
from fusion_compile.passes import Finding


def finding(kind: str, op: str, where: str = "a.py:1", why: str = "Why.") -> Finding:
    return Finding(kind, op, where, why, "Remedy.")


def test_waits_on_one_line_are_one_whatever_they_are_called() -> None:
    captured = finding("host_sync", "tensor.item()")
    in_aten = finding("host_sync", "aten._local_scalar_dense.default")
    broke = finding("graph_break", "tensor.item()")
    next_line = finding("host_sync", "tensor.item()", "a.py:2")
    assert deduplicate([captured, in_aten, next_line, broke]) == (captured, next_line)


def test_waits_without_a_line_are_told_apart_by_kind_operator_and_reason() -> None:
    findings = [
        finding("host_sync", "item", ""),
        finding("host_sync", "item", "", "Other."),
        finding("host_sync", "if", ""),
    ]
    assert deduplicate(findings) == tuple(findings)
    assert deduplicate([findings[0], findings[0]]) == (findings[0],)


def test_a_python_number_is_one_wherever_it_is_found() -> None:
    argument, guard = finding("python_scalar", "lr"), finding("python_scalar", "lr", "b.py:7", "It changed.")
    assert deduplicate([guard, argument, finding("python_scalar", "momentum")]) == (
        guard,
        finding("python_scalar", "momentum"),
    )


def test_other_findings_are_one_by_kind_operator_and_line() -> None:
    one = finding("recompile", "mode", why="It was 'a'.")
    again = finding("recompile", "mode", why="It was 'b'.")
    others = [finding("recompile", "mask"), finding("dynamic_shape", "mode"), finding("recompile", "mode", "a.py:2")]
    assert deduplicate([one, again, *others]) == (one, *others)


def test_an_identity_does_not_depend_on_severity_or_remedy() -> None:
    one = finding("recompile", "mode")
    assert identity(dataclasses.replace(one, remedy="Other.", severity="note")) == identity(one)
    assert identity(one) == "recompile of mode at a.py:1"
