"""A slot knows its request by identity, then by contents."""

from __future__ import annotations

import torch

from fusion_compile._sampler.table.request_slot import RequestSlot


def test_a_slot_starts_empty_and_is_emptied_by_another_request() -> None:
    slot = RequestSlot()
    assert not slot.is_live and not slot.is_equal([torch.ones(1)])
    slot.assign({"y": torch.ones(1)})
    slot.once, slot.done = True, {0, 1}
    slot.assign({"y": torch.zeros(1)})
    assert slot.is_live and not slot.once and slot.done == set()
    assert slot.known["y"].tolist() == [0]


def test_the_same_object_is_known_until_it_is_written_to() -> None:
    slot, y = RequestSlot(), torch.tensor([1, 2])
    slot.assign({"y": y})
    assert slot.is_same_object([y]) and not slot.is_same_object([y.clone()])
    y.fill_(7)
    assert not slot.is_same_object([y]) and not slot.is_equal([y])
    assert slot.known["y"].tolist() == [1, 2]  # a copy


def test_equal_numbers_are_the_same_request_and_known_as_an_object_from_then_on() -> None:
    slot, y = RequestSlot(), torch.tensor([1, 2])
    slot.assign({"y": y})
    twin = y.clone()
    assert slot.is_equal([twin]) and slot.is_same_object([twin])


def test_an_inference_tensor_counts_no_versions_so_only_its_contents_tell() -> None:
    slot = RequestSlot()
    with torch.inference_mode():
        y = torch.tensor([1, 2])
        slot.assign({"y": y})
        assert not slot.is_same_object([y]) and slot.is_equal([y])
