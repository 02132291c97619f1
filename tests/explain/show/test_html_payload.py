"""The columns that the report's script reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fusion_compile.explain._show import html_payload
from fusion_compile.explain._show.html import write_html
from tests.explain import report_data
from tests.explain.show.document import Document


def written(data: report_data.Data, folder: Path) -> Document:
    write_html(data, folder / "report.html")
    return Document((folder / "report.html").read_text(encoding="utf-8"))


def test_the_rows_hold_the_data(tmp_path: Path) -> None:
    data = report_data.training_step()
    rows = written(data, tmp_path).rows()
    nodes = data["graphs"][0]["nodes"]
    for key in ("op", "region", "module", "where"):
        coded = rows["nodes"][key]
        assert [coded["values"][code] for code in coded["codes"]] == [node[key] for node in nodes]
    assert rows["nodes"]["inputs"] == [node["inputs"] for node in nodes]
    places = {each["id"]: at for at, each in enumerate(data["findings"])}
    assert rows["nodes"]["finding"] == [places.get(node["finding"], -1) for node in nodes]
    assert sorted(at for at in rows["nodes"]["finding"] if at >= 0) == [1, 2]
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


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [("torch.bfloat16", [4, "s0"], "bf16[4, s0]"), ("float32", [], "f32[]"), ("", [], "")],
)
def test_a_type_is_short(dtype: str, shape: list[int | str], wanted: str) -> None:
    assert html_payload.tensor_type(dtype, shape) == wanted
