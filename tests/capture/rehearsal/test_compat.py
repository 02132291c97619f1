"""What the room takes from torch's private API does what it is taken for."""

from __future__ import annotations

import torch

from fusion_compile._capture.rehearsal._compat import (
    Arguments,
    alive,
    as_bytes,
    copy_of,
    dense_tensors,
    over_memory,
    storage_key,
)

aten = torch.ops.aten


def test_views_share_a_key_and_freed_memory_is_known() -> None:
    tensor = torch.arange(6.0)
    key = storage_key(tensor)
    assert key is not None and key == storage_key(tensor[2:].view(2, 2)) and key != storage_key(tensor.clone())
    memory = alive(key)
    assert memory is not None and memory.data_ptr() == tensor.data_ptr()
    del memory, tensor
    assert alive(key) is None


def test_a_copy_of_memory_is_read_like_the_original() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()[1:]
    copy = over_memory(tensor, copy_of(tensor.untyped_storage()))
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    tensor.zero_()
    assert torch.equal(copy, torch.tensor([[1.0, 4.0], [2.0, 5.0]]))
    assert as_bytes(tensor.untyped_storage()).shape == (24,)


def test_sparse_tensors_consist_of_dense_ones() -> None:
    sparse = torch.eye(3).to_sparse()
    assert [t.dtype for t in dense_tensors(sparse)] == [torch.int64, torch.float32]


def test_what_schemas_say() -> None:
    assert Arguments(aten.add_.Tensor).written == [0]
    assert Arguments(aten._foreach_add_.Scalar).written == [0]
    assert [Arguments(aten.native_batch_norm.default).names[i] for i in (3, 4)] == ["running_mean", "running_var"]
    assert Arguments(aten.native_batch_norm.default).statistics == [3, 4]
    assert Arguments(aten.bernoulli_.float).may_draw and not Arguments(aten.add.Tensor).may_draw
    assert Arguments(aten.zeros_like.default).reads_sizes_only and Arguments(aten.new_ones.default).reads_sizes_only
    assert not Arguments(aten.add.Tensor).reads_sizes_only
    assert Arguments(aten._local_scalar_dense.default).tells_the_cpu and Arguments(aten.equal.default).tells_the_cpu
    assert not Arguments(aten._has_same_storage_numel.default).tells_the_cpu
    assert Arguments(aten.add.Tensor).given((1,), {"other": 2}) == [1, 2, None]
