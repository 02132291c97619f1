"""`in_blocks`: the split itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_compile.optim._transform import Blocks
from fusion_compile.optim.matrix.blocks import in_blocks

BLOCKS = {
    "equal": Blocks((16, 16, 16)),
    "grouped queries": Blocks((32, 8, 8)),
    "same sizes apart": Blocks((8, 32, 8)),
    "all different": Blocks((8, 24, 16)),
    "columns": Blocks((20, 20), -1),
    "unequal columns": Blocks((8, 24, 8), -1),
}


ROWS, COLUMNS = 48, 40


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    return x / torch.linalg.matrix_norm(x, keepdim=True), torch.linalg.vector_norm(x, dim=-1, keepdim=True)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_size_is_one_call_and_results_lie_where_their_blocks_did(kind: str) -> None:
    blocks, x = BLOCKS[kind], torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)
    calls: list[tuple[int, ...]] = []

    def fn(t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(tuple(t.shape))
        return unit(t)

    whole, norms = in_blocks(fn, blocks, x)
    parts = torch.split(x, list(blocks.sizes), blocks.axis)
    torch.testing.assert_close(whole, torch.cat([unit(p)[0] for p in parts], blocks.axis), rtol=1e-14, atol=0)
    torch.testing.assert_close(norms, torch.cat([unit(p)[1] for p in parts], blocks.axis), rtol=1e-14, atol=0)
    assert len(calls) == len(set(blocks.sizes))
    assert sum(shape[1] for shape in calls) == len(blocks.sizes)


def test_equal_blocks_of_rows_are_views() -> None:
    x, seen = torch.randn(2, 12, 5), []
    in_blocks(lambda t: (seen.append(t.data_ptr()) or t,), Blocks((4, 4, 4)), x)  # type: ignore[func-returns-value]
    assert seen == [x.data_ptr()]


def test_blocks_that_do_not_divide_the_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks of 4\+4 do not divide \(2, 12, 5\) along axis -2"):
        in_blocks(unit, Blocks((4, 4)), torch.randn(2, 12, 5))
