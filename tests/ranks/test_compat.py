"""Tests: collectives by name are in one graph, and any tensor is bytes."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._ranks import _compat


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_tensor_of_any_dtype_is_bytes_in_the_same_memory(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3).to(dtype)
    _compat.as_bytes(tensor).zero_()
    assert not tensor.any()
    assert _compat.as_bytes(torch.ones((), dtype=dtype)).numel() == dtype.itemsize
    assert _compat.as_bytes(torch.ones(0, dtype=dtype)).numel() == 0


def test_the_operators_that_graphs_hold_exist() -> None:
    names = ["all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "wait_tensor"]
    assert all(hasattr(getattr(torch.ops, _compat.NAMESPACE), name) for name in names)
