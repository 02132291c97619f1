"""The report as a file: what it says, that it loads nothing, and that whatever the data hold stays text."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile
from fusion_compile.explain._show import html_diff, html_numbers, html_payload, html_plots
from fusion_compile.explain._show.html import write_diff_html, write_html
from fusion_compile.explain._show.region_diagram import BOX_HEIGHT, BOX_WIDTH, region_diagram
from tests.explain import report_data

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&<!--]]>`{{7*7}}\u2028$x$"


class Document(HTMLParser):
    """Tags, attributes, the text outside of style and script, and the content of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def rows(self) -> Any:
        return json.loads(self.scripts[0])


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


def test_the_rows_hold_the_data(tmp_path: Path) -> None:
    data = report_data.training_step()
    rows = written(data, tmp_path).rows()
    nodes = data["graphs"][0]["nodes"]
    for key in ("op", "region", "module", "where"):
        coded = rows["nodes"][key]
        assert [coded["values"][code] for code in coded["codes"]] == [node[key] for node in nodes]
    assert rows["nodes"]["inputs"] == [node["inputs"] for node in nodes]
    assert rows["nodes"]["finding"] == [-1 if node["finding"] is None else node["finding"] for node in nodes]
    assert rows["nodes"]["microseconds"] == pytest.approx(
        [node["microseconds"] for node in nodes], rel=1e-4
    )  # 5 digits
    assert rows["graphs"][0]["curve"] == data["graphs"][0]["memory"]["curve"]
    lines = rows["passes"]["lines"]
    for text, each in zip(rows["passes"]["texts"], data["passes"], strict=True):
        assert [lines[code] for code in text["before"]] == each["before"]
        assert [lines[code] for code in text["before" if text["after"] is None else "after"]] == each["after"]
    assert rows["kernels"]["source"] == [kernel["source"] for kernel in data["runtime"]["kernels"]]


def test_an_infinite_intensity_does_not_break_the_json(tmp_path: Path) -> None:
    data = report_data.training_step()
    data["graphs"][0]["nodes"][3]["intensity"] = float("inf")
    data["graphs"][0]["nodes"][4]["intensity"] = float("nan")
    assert written(data, tmp_path).rows()["nodes"]["intensity"][3:5] == [None, None]


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
    empty = {"curve": [], "peak_bytes": 0, "peak_node": 0, "alive_at_peak": []}
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
            {"schema": "fusion_compile.explanation", "version": 2},
            "an explanation of version 2; this fusion_compile reads version 1",
        ),
    ],
)
def test_what_is_no_explanation_is_refused(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        write_html(data, tmp_path / "report.html")
    with pytest.raises(ValueError, match=re.escape(f"as the second, {said}")):
        write_diff_html(report_data.sampler(), data, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_comparison_names_what_is_new_and_what_is_gone() -> None:
    before, after = report_data.training_step(), report_data.training_step()
    gone = after["findings"].pop(0)
    new = report_data.finding("recompile", "step", "a.py:1", "Why.", "Remedy.")
    after["findings"].append(new)
    after["findings"].append(before["findings"][1])  # twice where it was once
    after["findings"][1] = after["findings"][1] | {"where": "/home/ada/dit/model.py:67"}  # moved by an edit above it
    found = html_diff.compare(before, after)
    assert found["findings"]["gone"] == [gone]
    assert found["findings"]["new"] == [new, before["findings"][1]]
    assert len(found["findings"]["same"]) == len(before["findings"]) - 1
    assert found["changed"]["count"] == 0 and found["operators"] == []


def test_a_comparison_counts_nodes_whatever_their_names() -> None:
    before, after = report_data.training_step(), report_data.training_step()
    nodes = after["graphs"][0]["nodes"]
    for at, node in enumerate(nodes):
        node["name"] = f"renamed_{at}"
    extra = dict(nodes[2])
    nodes.append(extra)
    changed = html_diff.compare(before, after)["changed"]
    assert changed["count"] == 1
    assert (changed["op"][0], changed["where"][0]) == (extra["op"], extra["where"])
    assert changed["after"][0] == changed["before"][0] + 1
    assert changed["microseconds"][0] == pytest.approx(extra["microseconds"], rel=1e-4)  # 5 digits


def test_a_graph_or_a_runtime_that_only_one_side_has() -> None:
    before, after = report_data.sampler(), report_data.training_step()
    found = html_diff.compare(before, after)
    assert [(graph["name"], graph["presence"]) for graph in found["graphs"]] == [
        ("sampler", "before"),
        ("step", "after"),
    ]
    assert ("graph breaks", None, 1, False) in found["runtime"]


def test_the_parts_of_a_pass_turn_the_text_before_into_the_text_after() -> None:
    chance = random.Random(0)
    for letters in (3, 12, 200):
        for _ in range(150):
            before, after = ([chance.randrange(letters) for _ in range(chance.randrange(20))] for _ in range(2))
            made: list[int] = []
            at = there = 0
            for i1, i2, j1, j2 in html_payload._parts(before, after):
                assert before[at:i1] == after[there:j1]
                made += before[at:i1] + after[j1:j2]
                at, there = i2, j2
            assert before[at:] == after[there:]
            assert made + before[at:] == after


def test_a_pass_over_20000_lines_is_compared_by_what_it_changed() -> None:
    before = list(range(20_000))
    after = [line + 100_000 if line % 16 == 0 else line for line in before if line % 50 != 7]
    parts = html_payload._parts(before, after)
    assert sum(i2 - i1 for i1, i2, *_ in parts) == sum(line % 16 == 0 or line % 50 == 7 for line in before)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(
    "flows",
    [
        [("a", "b", 10), ("b", "c", 1), ("a", "c", 5)],
        [("a", "c", 10), ("b", "c", 1)],
        [("a", "b", 1), ("b", "c", 2), ("c", "a", 3)],
        [],
    ],
)
def test_boxes_do_not_overlap_and_all_lies_in_the_picture(flows: list[tuple[str, str, int]], across: bool) -> None:
    regions = [{"name": name, "nodes": 1, "launches": 1, "flops": 1, "bytes": 1, "microseconds": 1.0} for name in "abc"]
    picture = region_diagram({"regions": regions, "edges": flows}, across=across)
    for one, other in itertools.combinations(picture.boxes, 2):
        assert abs(one.x - other.x) >= BOX_WIDTH or abs(one.y - other.y) >= BOX_HEIGHT
    assert [(arrow.source, arrow.target) for arrow in picture.arrows] == [(a, b) for a, b, _ in flows]
    for box in picture.boxes:
        assert 0 <= box.x <= picture.width - BOX_WIDTH and 0 <= box.y <= picture.height - BOX_HEIGHT
        assert box.share == pytest.approx(1 / 3)
    for arrow in picture.arrows:
        numbers = re.findall(r"-?[\d.]+", arrow.path + arrow.head.partition("l")[0])
        assert all(0 <= float(x) <= picture.width for x in numbers[::2])
        assert all(0 <= float(y) <= picture.height for y in numbers[1::2])


def test_a_long_curve_keeps_its_peak() -> None:
    from matplotlib.figure import Figure

    curve = [1000] * 20_000
    curve[12_345] = 9_000_000
    axes = Figure().add_axes((0, 0, 1, 1))
    html_plots._step(axes, curve, "ink", fill=False)
    drawn = axes.lines[0].get_xydata()
    assert len(drawn) < 2000
    assert [12_345, 9_000_000] in drawn.tolist()


def test_the_ridge_is_where_compute_and_memory_take_equally_long() -> None:
    nodes = report_data.step_nodes(2)
    ridge = report_data.PEAK_FLOPS / report_data.BANDWIDTH
    assert html_plots._ridge(nodes) == pytest.approx(ridge)
    assert html_plots._ridge([node for node in nodes if node["flops"] == 0]) is None
    assert html_plots._ridge([node for node in nodes if node["flops"] > 1e10]) is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (html_numbers.size(0), "0 B"),
        (html_numbers.size(1023), "1023 B"),
        (html_numbers.size(1_572_864), "1.50 MiB"),
        (html_numbers.size(2**30 - 1), "1.00 GiB"),
        (html_numbers.size(-2048), "−2.00 KiB"),
        (html_numbers.flops(999), "999 FLOP"),
        (html_numbers.flops(1.5e12), "1.50 TFLOP"),
        (html_numbers.time(0.034), "34.0 ns"),
        (html_numbers.time(0), "0 µs"),
        (html_numbers.time(999.6), "1.00 ms"),
        (html_numbers.time(2.5e6), "2.50 s"),
        (html_numbers.share(1, 8), "12 %"),
        (html_numbers.share(1, 10_000), "< 0.1 %"),
        (html_numbers.share(0, 0), "0 %"),
        (html_numbers.change(8, 9), "+12 %"),
        (html_numbers.change(3, 3), "="),
        (html_numbers.change(0, 3), "new"),
        (html_numbers.round_time(100_000), "100 ms"),
        (html_numbers.round_time(0.01), "10 ns"),
        (html_payload.tensor_type("torch.bfloat16", [4, "s0"]), "bf16[4, s0]"),
        (html_payload.tensor_type("float32", []), "f32[]"),
        (html_payload.tensor_type("", []), ""),
    ],
)
def test_numbers_read_well(said: str, wanted: str) -> None:
    assert said == wanted
