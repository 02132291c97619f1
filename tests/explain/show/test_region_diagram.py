"""The diagram of regions."""

from __future__ import annotations

import itertools
import re

import pytest

from fusion_compile.explain._show.region_diagram import BOX_HEIGHT, BOX_WIDTH, region_diagram


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
