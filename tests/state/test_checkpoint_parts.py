"""Tests: what is written in parts is read as it was, whole, and anything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusion_compile._state import checkpoint_parts
from fusion_compile._state.checkpoint_parts import UNREADABLE, read, with_whole_stacks, write

TENSORS = {
    "model.a": torch.arange(6.0).view(2, 3),
    "optimizer.mu.a": torch.ones(3, dtype=torch.bfloat16),
    "optimizer.none": torch.zeros(0, 4),
    "counts.step": torch.tensor(7),
    "rng.cpu": torch.arange(5, dtype=torch.uint8),
}


def test_every_tensor_comes_back_with_its_bits(tmp_path: Path) -> None:
    sums = write(tmp_path / "parts", TENSORS, None)
    back = read(tmp_path / "parts")
    assert back.keys() == sums.keys() == TENSORS.keys()
    assert all(torch.equal(t, TENSORS[key]) and t.dtype == TENSORS[key].dtype for key, t in back.items())


def test_what_is_missing_or_something_else_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UNREADABLE):
        read(tmp_path / "nothing")
    write(tmp_path / "parts", TENSORS, None)
    (tmp_path / "parts" / "__0_0.distcp").unlink()
    with pytest.raises(OSError, match="distcp"):
        read(tmp_path / "parts")
    (tmp_path / "parts" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(UNREADABLE):
        read(tmp_path / "parts")


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file")
    with pytest.raises(OSError, match=r"rank 0 could not write its part: .*parts"):
        write(tmp_path / "parts", TENSORS, None)
    assert issubclass(checkpoint_parts.Lost, OSError)


def test_matrices_of_a_stack_are_laid_together() -> None:
    given = {f"optimizer.mu.up[{i}]": torch.full((3, 4), float(i)) for i in range(2)}
    given |= {f"optimizer.scale.up[{i}]": torch.full((3, 1), float(i)) for i in range(2)}
    found = with_whole_stacks({**given, "model.up": torch.zeros(1)}, {"up": {"shape": [1, 2, 3, 4], "matrix": [3, 4]}})
    assert {key: [*t.shape] for key, t in found.items()} == {
        "model.up": [1],
        "optimizer.mu.up": [1, 2, 3, 4],
        "optimizer.scale.up": [2, 3, 1],
    }
    assert found["optimizer.mu.up"][0, 1].eq(1).all()
