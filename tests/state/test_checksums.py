"""A checksum changes with every bit, with the dtype and with the shape, and with nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from fusion_compile._state import checksums

TENSORS = {
    "fp32": torch.arange(6.0).reshape(2, 3),
    "a number": torch.tensor(7),
    "nothing": torch.zeros(0, 3),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j, 3 - 4j]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_copy_in_another_layout_has_the_same_checksum(name: str) -> None:
    tensor = TENSORS[name]
    strided = tensor.unsqueeze(-1).expand(*tensor.shape, 2)[..., 0]
    assert checksums.of_tensor(strided) == checksums.of_tensor(tensor)
    assert len(checksums.of_tensor(tensor)) == 8


def test_every_single_bit_counts() -> None:
    tensor = torch.randn(5)
    seen = {checksums.of_tensor(tensor)}
    for bit in range(8 * 5 * 4):
        changed = tensor.clone()
        changed.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        seen.add(checksums.of_tensor(changed))
    assert len(seen) == 8 * 5 * 4 + 1


@pytest.mark.parametrize(
    "other", [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.float16), torch.zeros(4).half()[:3]]
)
def test_the_same_bytes_of_another_dtype_or_shape_are_another_tensor(other: Tensor) -> None:
    assert checksums.of_tensor(other) != checksums.of_tensor(torch.zeros(4, dtype=torch.float16))


def test_a_conjugated_view_is_what_it_shows() -> None:
    tensor = TENSORS["complex"]
    assert checksums.of_tensor(tensor.conj()) == checksums.of_tensor(tensor.conj().resolve_conj())
    assert checksums.of_tensor(tensor.conj()) != checksums.of_tensor(tensor)


def test_an_index_is_its_content_and_not_its_spelling() -> None:
    index = {"a": [1, 2.5], "b": {"x": None}, "checksum": "old"}
    again = json.loads(json.dumps(dict(reversed(index.items())), indent=4))
    assert checksums.of_index(again) == checksums.of_index(index) == checksums.of_index({**index, "checksum": "new"})
    assert checksums.of_index({**index, "a": [1, 2.5000001]}) != checksums.of_index(index)


def test_what_is_damaged_is_listed_by_name() -> None:
    saved = {"kept": torch.ones(2), "flipped": torch.zeros(3), "gone": torch.zeros(1)}
    sums = checksums.of_tensors(saved)
    assert checksums.damaged(saved, sums) == []
    found = checksums.damaged({"kept": torch.ones(2), "flipped": torch.tensor([0, 0, 2.0]), "new": torch.ones(1)}, sums)
    assert [line.split()[0] for line in found] == ["new", "gone", "flipped"]
    assert "flipped [3] torch.float32 has the checksum" in found[2] and sums["flipped"] in found[2]
