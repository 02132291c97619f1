"""Dataclasses as JSON data and files."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusion_compile as fc


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        fc.Explanation.from_json(tmp_path / "x.json")
