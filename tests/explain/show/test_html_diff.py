"""The rows of the page that compares two explanations."""

from __future__ import annotations

import pytest

from fusion_compile.explain._comparison import compare
from fusion_compile.explain._facts import ExplanationFacts
from fusion_compile.explain._show.html_diff import diff_rows
from fusion_compile.explain._show.json_form import rebuild
from fusion_compile.passes import Finding
from tests.explain import report_data


def compared(before: report_data.Data, after: report_data.Data) -> report_data.Data:
    difference = compare(rebuild(ExplanationFacts, before), rebuild(ExplanationFacts, after))
    return diff_rows(difference, before, after)


def described(data: report_data.Data) -> Finding:
    return rebuild(Finding, data)


def test_a_comparison_names_what_is_new_and_what_is_gone() -> None:
    before, after = report_data.training_step(), report_data.training_step()
    gone = after["findings"].pop(0)
    new = report_data.finding("recompile", "step", "a.py:1", "Why.", "Remedy.")
    after["findings"].append(new)
    after["findings"].append(before["findings"][1])  # twice where it was once
    after["findings"][1] = after["findings"][1] | {"where": "/home/ada/dit/model.py:67"}  # moved by an edit above it
    found = compared(before, after)
    assert found["findings"]["gone"] == (described(gone),)
    assert found["findings"]["new"] == (described(new), described(before["findings"][1]))
    assert len(found["findings"]["same"]) == len(before["findings"]) - 1
    assert found["changed"]["count"] == 0 and found["operators"] == []


def test_a_comparison_counts_nodes_whatever_their_names() -> None:
    before, after = report_data.training_step(), report_data.training_step()
    nodes = after["graphs"][0]["nodes"]
    for at, node in enumerate(nodes):
        node["name"] = f"renamed_{at}"
    extra = dict(nodes[2])
    nodes.append(extra)
    changed = compared(before, after)["changed"]
    assert changed["count"] == 1
    assert (changed["op"][0], changed["where"][0]) == (extra["op"], extra["where"])
    assert changed["after"][0] == changed["before"][0] + 1
    assert changed["microseconds"][0] == pytest.approx(extra["microseconds"], rel=1e-4)  # 5 digits


def test_a_graph_or_a_runtime_that_only_one_side_has() -> None:
    before, after = report_data.sampler(), report_data.training_step()
    found = compared(before, after)
    assert [(graph["name"], graph["presence"]) for graph in found["graphs"]] == [
        ("sampler", "before"),
        ("step", "after"),
    ]
    assert ("graph breaks", None, 1, False) in found["runtime"]
