"""A checksum sees every entry of a tensor, and an exchange of two."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.weights.checksum import checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(3, 1021), (1, 5), (64, 96), (2, 1021, 4)], ids=str)
def test_a_checksum_sees_every_entry_and_an_exchange(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    before = (torch.rand(shape) * 100).to(dtype)
    for change in ("one entry", "signs", "all signs", "two entries", "rows", "reversed"):
        after = before.clone()
        flat = after.view(-1)
        if change == "one entry":
            flat[-1] += 1
        elif change == "signs" and dtype.is_floating_point:
            flat[:2] = -flat[:2]
        elif change == "all signs" and dtype.is_floating_point:
            flat.neg_()
        elif change == "two entries":
            flat[[0, 3]] = before.view(-1)[[3, 0]]
        elif change == "rows":
            after.copy_(before.roll(1, -1))
        else:
            flat.copy_(before.view(-1).flip(0))
        if not torch.equal(before, after):
            assert checksums([before]) != checksums([after]), change
    assert torch.equal(checksums([before]), checksums([before.clone()]))
    assert torch.equal(checksums([before[..., 1:]]), checksums([before[..., 1:].clone()]))  # a view
