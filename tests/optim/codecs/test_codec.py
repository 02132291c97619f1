"""What all codecs have in common: shapes, zeros, what is not finite, and rows that do not see each other."""

from __future__ import annotations

import math

import pytest
import torch

from fusion_compile.optim.codecs.all_codecs import CODECS
from fusion_compile.optim.codecs.codec import Codec, divisor, in_blocks, is_finite, largest, spread

EVERY = list(CODECS.values())
SHAPES = [(1024,), (3, 6, 10), (2, 5, 7), (2, 9, 1), (4, 130)]


def kept(codec: Codec, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    return codec.decode(codec.encode(x, noise), x)


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: codec.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_dtype_come_back_and_zeros_stay(codec: Codec, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, dtype=dtype)
        x.view(-1)[::3] = 0
        back = kept(codec, x)
        assert back.shape == x.shape and back.dtype == dtype
        assert bool((back[x == 0] == 0).all())
        assert torch.equal(kept(codec, torch.zeros(shape)), torch.zeros(shape))
        assert math.isfinite(float(back.abs().sum()))


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: codec.name)
def test_what_is_not_finite_stays_so_and_spoils_no_other_entry(codec: Codec) -> None:
    x = torch.randn(2, 4, 256)
    bad = x.clone()
    bad[0, 1, 3], bad[1, 2, 7] = float("nan"), float("inf")
    with_zeros = bad.nan_to_num(0, 0, 0)
    back, without = kept(codec, bad), kept(codec, with_zeros)
    assert not bool(back[0, 1, 3].isfinite()) and not bool(back[1, 2, 7].isfinite())
    assert torch.equal(back[bad.isfinite()], without[bad.isfinite()])


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: codec.name)
def test_a_symmetric_code_and_no_change_by_a_power_of_two(codec: Codec) -> None:
    x = torch.randn(3, 5, 128)
    assert torch.equal(kept(codec, -x), -kept(codec, x))
    assert torch.equal(kept(codec, 2.0**-20 * x), 2.0**-20 * kept(codec, x))


@pytest.mark.parametrize("codec", EVERY, ids=lambda codec: codec.name)
def test_parameters_of_one_bank_do_not_see_each_other(codec: Codec) -> None:
    stacked = torch.randn(3, 6, 64)
    alone = torch.cat([kept(codec, m[None]) for m in stacked])
    assert torch.equal(kept(codec, stacked), alone)
    flat = torch.randn(4 * codec.block)
    ends = torch.cat([kept(codec, flat[: codec.block]), kept(codec, flat[codec.block :])])
    assert torch.equal(kept(codec, flat), ends)


def test_rows_and_blocks() -> None:
    x = torch.arange(1.0, 7.0).view(1, 2, 3)
    assert torch.equal(largest(x, 512), torch.tensor([[[3.0], [6.0]]]))
    assert torch.equal(largest(x[..., :1], 512), torch.tensor([[[4.0]]]))  # one number a row: the rows share a scale
    flat = torch.arange(5.0)
    assert torch.equal(in_blocks(flat, 4), torch.tensor([[0.0, 1, 2, 3], [4, 0, 0, 0]]))
    assert torch.equal(largest(flat, 4), torch.tensor([3.0, 4.0]))
    assert torch.equal(spread(torch.tensor([3.0, 4.0]), flat, 4), torch.tensor([3.0, 3, 3, 3, 4]))
    assert torch.equal(divisor(torch.tensor([0.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert is_finite(torch.tensor([1.0, float("inf"), float("nan")])).tolist() == [True, False, False]
