"""Copies to the CPU, which on a CPU are the tensors themselves."""

from __future__ import annotations

import torch

from fusion_compile._sampler.read_back import ReadBack


def test_a_tensor_on_the_cpu_is_read_where_it_lies() -> None:
    t = torch.arange(3.0, requires_grad=True)
    (read,) = ReadBack().now(t)
    assert read.data_ptr() == t.data_ptr() and not read.requires_grad


def test_a_copy_made_later_keeps_the_values_of_its_moment() -> None:
    back = ReadBack()
    assert back.arrived() is None
    flag, values = torch.tensor(True), torch.tensor([1.0, 2.0])
    back.later(flag, values)
    values.zero_()
    arrived = back.arrived()
    assert arrived is not None and [t.tolist() for t in arrived] == [True, [1.0, 2.0]]


def test_other_shapes_get_other_memory() -> None:
    back = ReadBack()
    back.later(torch.ones(2))
    back.later(torch.ones(3, dtype=torch.int64))
    arrived = back.arrived()
    assert arrived is not None and arrived[0].shape == (3,) and arrived[0].dtype is torch.int64
