"""Tests: what every rank has of small tensors, from one collective."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._ranks import packed
from fusion_compile._ranks.groups import Group


def test_shapes_and_kinds_come_back_from_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def gather(tensor: torch.Tensor, size: int, name: str) -> torch.Tensor:
        sent.append(tensor)
        return torch.cat([tensor, tensor * 2])

    monkeypatch.setattr(packed, "start_all_gather", gather)
    monkeypatch.setattr(packed, "wait", lambda t: t)
    given = {
        "loss": torch.tensor(0.5),
        "count": torch.tensor(2**40 + 1),
        "vector": torch.tensor([1.0, 2.0]).bfloat16(),
        "phase": torch.tensor(1 + 2j),
    }
    rows = packed.of_every_rank(given, Group("g", (0, 1), 0))
    assert len(sent) == 1 and sent[0].dtype == torch.float64
    assert rows["loss"].tolist() == [0.5, 1.0]
    assert rows["count"].tolist() == [2**40 + 1, 2**41 + 2]
    assert rows["vector"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert rows["phase"].tolist() == [1 + 2j, 2 + 4j]
