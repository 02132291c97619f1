"""The report as a file: it says what the data say, loads nothing, and keeps hostile text as text."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile
from fusion_compile.explain._show.html import write_diff_html, write_html
from tests.explain import report_data
from tests.explain.show.document import Document

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&<!--]]>`{{7*7}}\u2028$x$"


def written(data: report_data.Data, folder: Path) -> Document:
    write_html(data, folder / "report.html")
    return Document((folder / "report.html").read_text(encoding="utf-8"))


def with_text(data: Any, text: str) -> Any:
    """The same data with `text` behind each string that a program could name; keys, kinds and enumerations stay."""
    fixed = {"schema", "kind", "severity", "status", "binding_time", "decision", "dtype", "region"}
    if isinstance(data, dict):
        return {key: value if key in fixed else with_text(value, text) for key, value in data.items()}
    if isinstance(data, list):
        return [with_text(value, text) for value in data]
    return data + text if isinstance(data, str) else data


@pytest.mark.parametrize("data", [report_data.training_step(), report_data.sampler()], ids=["step", "sampler"])
def test_nothing_is_loaded_and_each_link_leads_somewhere(data: report_data.Data, tmp_path: Path) -> None:
    document = written(data, tmp_path)
    assert document.tags["script"] == 2
    assert not document.tags.keys() & {"img", "link", "iframe", "object", "embed", "base"}
    targets = [value for name, value in document.attributes if name in ("href", "src", "xlink:href")]
    assert targets and all(target.startswith("#") for target in targets)
    ids = [value for name, value in document.attributes if name == "id"]
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    nodes = len(data["graphs"][0]["nodes"])
    for target in targets:
        place = re.fullmatch(r"#node-0-(\d+)", target)
        assert int(place[1]) < nodes if place else target[1:] in ids
    referred = re.findall(r"url\(#([^)]*)\)", " ".join(value for _, value in document.attributes))
    assert set(referred) <= set(ids)


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_html(report_data.training_step(), tmp_path / name)
        write_diff_html(report_data.training_step(), report_data.training_step(3), tmp_path / f"{name}2")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a2").read_bytes() == (tmp_path / "b2").read_bytes()


def test_what_the_data_say_stays_text(tmp_path: Path) -> None:
    data = with_text(report_data.training_step(), HOSTILE)
    write_diff_html(data, with_text(report_data.sampler(), HOSTILE), tmp_path / "diff.html")
    plain = Document((tmp_path / "diff.html").read_text(encoding="utf-8")), written(data, tmp_path)
    for document in plain:
        assert document.tags["script"] == 2
        assert document.tags["img"] == 0
        assert not [name for name, _ in document.attributes if name.startswith("on")]
        assert "49" + "`" not in document.text  # the template engine saw no template in it
        assert HOSTILE.replace("`", "") in document.text.replace("`", "")
    names = plain[1].rows()["nodes"]["name"]
    assert names == [node["name"] for node in data["graphs"][0]["nodes"]]


def test_half_a_surrogate_pair_in_a_name_does_not_stop_the_report(tmp_path: Path) -> None:
    data = report_data.training_step()
    data["title"] = data["graphs"][0]["nodes"][0]["name"] = data["findings"][0]["why"] = "half \ud83d"
    assert "half" in written(data, tmp_path).text


def test_names_in_any_script_are_drawn(tmp_path: Path) -> None:
    data = report_data.training_step()
    for node in data["graphs"][0]["nodes"]:
        node["op"], node["region"] = "_注意🙂", "_前"
    for region in data["graphs"][0]["regions"]:
        region["name"] = "_前"
    data["graphs"][0]["regions"] = data["graphs"][0]["regions"][:1]
    document = written(data, tmp_path)
    assert re.search(r"<text[^>]*>_注意🙂</text>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "\u200b_前" in document.text  # the legend


def test_the_summary_says_what_is_not_captured_and_what_costs_most(tmp_path: Path) -> None:
    data = report_data.training_step()
    text = " ".join(written(data, tmp_path).text.split())
    assert "Not captured: capture_unsafe, graph_break, host_sync." in text
    assert "3 errors, 2 warnings, 1 note in all." in text
    costs: Counter[str] = Counter()
    for node in data["graphs"][0]["nodes"]:
        costs[node["where"]] += node["microseconds"]
    first, seconds = costs.most_common(1)[0]
    share = f"{100 * seconds / costs.total():.0f} %"
    begin = text.index("The most expensive lines")
    assert share in text[begin:][:60]
    assert first.removeprefix("/home/ada/") in text[begin:][:60]


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((), "Nothing was found that keeps this program from capture."),
        ((("python_scalar", "error"),), "Compiled or recorded again: python_scalar."),
        ((("unmarked_mutation", "error"),), "Not captured: unmarked_mutation."),
        ((("unmarked_mutation", "warning"),), "Nothing was found that keeps this program from capture."),
        ((("cudagraph_partition", "warning"),), "Not captured: cudagraph_partition."),
        (
            (("recompile", "error"), ("cpu_tensor", "error"), ("recompile", "error")),
            "Not captured: cpu_tensor. Compiled or recorded again: recompile × 2.",
        ),
    ],
)
def test_the_verdict_follows_from_the_errors(tmp_path: Path, kinds: tuple[tuple[str, str], ...], said: str) -> None:
    data = report_data.training_step()
    data["findings"] = [
        {"id": str(i), "kind": kind, "op": "op", "where": "", "why": "Why.", "remedy": "Remedy.", "severity": severity}
        for i, (kind, severity) in enumerate(kinds)
    ]
    for graph in data["graphs"]:
        for node in graph["nodes"]:
            node["finding"] = None
    text = " ".join(written(data, tmp_path).text.split())
    assert said in text
    assert ("Nothing was found" in text) == said.startswith("Nothing")


def test_no_verdict_is_given_of_what_was_not_captured(tmp_path: Path) -> None:
    data = report_data.training_step() | {"findings": [], "graphs": []}
    text = written(data, tmp_path).text
    assert "Nothing was captured, so nothing is known of it." in text and "Nothing was found" not in text


def test_counts_of_what_was_not_watched_are_not_shown_as_zero(tmp_path: Path) -> None:
    data = report_data.training_step()
    data["runtime"] |= {"graph_breaks": [], "recompiles": [], "phases": []}
    data["runtime"]["cudagraphs"] |= {"captures": 0, "partitions": 0, "skips": [], "rerecords": []}
    text = " ".join(written(data, tmp_path).text.split())
    for label in ("graph breaks", "recompiles", "partitions", "skips", "re-records"):
        assert re.search(rf"{label} ?not watched", text), label


def test_what_explain_returns_is_written(tmp_path: Path) -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(8, 4), nn.GELU()), (torch.randn(2, 8),))
    explanation = fusion_compile.explain(program)
    explanation.to_html(tmp_path / "report.html")
    document = Document((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert document.rows()["nodes"]["name"] == [node.name for node in explanation.graphs[0].nodes]
    assert explanation.title in document.text
    write_diff_html(explanation.to_json(), explanation.to_json(), tmp_path / "diff.html")
    assert "0 new findings; 0 gone" in (tmp_path / "diff.html").read_text(encoding="utf-8")


def test_a_program_without_findings_that_was_not_run(tmp_path: Path) -> None:
    text = written(report_data.sampler(), tmp_path).text
    assert "Nothing was found that keeps this program from capture." in text
    assert "The program was read, not run" in text
    assert "Not observed" in text


def test_an_explanation_of_nothing_is_still_a_report(tmp_path: Path) -> None:
    data = report_data.training_step() | {
        "findings": [], "summary": [], "sections": [], "graphs": [], "passes": [], "runtime": None, "notes": [],
    }  # fmt: skip
    assert "No findings." in written(data, tmp_path).text
    empty = {"curve": [], "peak_bytes": 0, "peak_node": 0, "alive_at_peak": [], "fused_peak_bytes": 0}
    data["graphs"] = [{"name": "empty", "regions": [], "edges": [], "nodes": [], "memory": empty}]
    text = written(data, tmp_path).text
    assert "The memory of this graph was not computed." in text
    assert "No node of this graph has a roofline time." in text
    write_diff_html(data, report_data.training_step(), tmp_path / "diff.html")


def test_without_matplotlib_the_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = written(report_data.training_step(), tmp_path).text
    assert text.count("pip install matplotlib") == 2  # in the place of the cost plot and of the memory curve
    assert "The most expensive operators" in text and "Alive at the peak" in text
    write_diff_html(report_data.training_step(), report_data.training_step(3), tmp_path / "diff.html")
    assert "pip install matplotlib" in (tmp_path / "diff.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "a list; it takes the data of an explanation"),
        ({"nodes": []}, "a dict; it takes the data of an explanation"),
        ({"schema": "other"}, "data of the schema 'other'"),
        (
            {"schema": "fusion_compile.explanation", "version": 1},
            "an explanation of version 1; this fusion_compile reads version 2",
        ),
    ],
)
def test_what_is_no_explanation_is_refused(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        write_html(data, tmp_path / "report.html")
    with pytest.raises(ValueError, match=re.escape(f"as the second, {said}")):
        write_diff_html(report_data.sampler(), data, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
