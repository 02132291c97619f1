"""The difference of two explanations: nothing for the same program, and the change itself for a changed one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import fusion_compile as fc
from fusion_compile.explain._facts import Kernel, RuntimeFacts


def first(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).relu()


def second(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).relu()
    return torch.linalg.eigh(y @ y.T)[0]


def explained(fn: object, size: int = 4) -> fc.Explanation:
    return fc.explain(fn, (torch.randn(3, size), torch.randn(size, 5)), run=False)


def test_more_operators_are_told_by_region_and_their_cost_and_finding_are_new() -> None:
    difference = explained(first).diff(explained(second))
    assert difference
    changed = {d.operator: (d.region, d.before, d.after) for d in difference.regions}
    assert changed["aten.mm.default"] == ("forward", 1, 2)
    assert changed["aten._linalg_eigh.default"] == ("forward", 0, 1)
    assert "aten.relu.default" not in changed
    assert [f.kind for f in difference.findings_new] == ["capture_unsafe"]
    assert difference.findings_gone == ()
    costs = {c.name: (c.before, c.after) for c in difference.costs}
    assert costs["FLOP"] == (2 * 3 * 4 * 5, 2 * 3 * 4 * 5 + 2 * 3 * 5 * 3)
    text = str(difference)
    assert "aten._linalg_eigh.default" in text and "1 finding new" in text
    back = explained(second).diff(explained(first))
    assert back.findings_gone == difference.findings_new and back.nodes_gone == difference.nodes_new


def test_another_shape_is_another_node_and_a_moved_line_is_no_new_finding() -> None:
    difference = explained(first, 4).diff(explained(first, 8))
    assert difference.regions == ()  # the same operators
    assert difference.nodes_new == difference.nodes_gone == ()  # the result of x @ w is [3, 5] in both
    assert {c.name for c in difference.costs} == {"FLOP", "bytes moved", "roofline µs", "peak bytes"}
    before = explained(second)
    moved = dataclasses.replace(before.findings[0], where=before.findings[0].where.rpartition(":")[0] + ":9999")
    assert before.diff(dataclasses.replace(before, findings=(moved,))).findings_new == ()


def test_kernels_and_what_happened_at_run_time_are_compared() -> None:
    plain = explained(first)
    before = dataclasses.replace(plain, runtime=RuntimeFacts(kernels=(Kernel("a"), Kernel("a"), Kernel("b"))))
    after = dataclasses.replace(plain, runtime=RuntimeFacts(kernels=(Kernel("a"), Kernel("c"))))
    difference = before.diff(after)
    assert (difference.kernels_gone, difference.kernels_new) == (("a", "b"), ("c",))
    assert difference.to_json()["kernels_new"] == ["c"]


def test_one_more_finding_of_a_kind_in_a_file_is_new() -> None:
    """It is what a gate is for: the file had one already."""
    one = explained(second)
    finding = one.findings[0]
    again = dataclasses.replace(finding, where=finding.where.rpartition(":")[0] + ":999")
    difference = one.diff(dataclasses.replace(one, findings=(again, finding)))
    assert difference.findings_new == (again,)
    assert difference.findings_gone == ()
