"""Sums over repeated indices give the same bits in every run, with several threads too."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from fusion_compile._program.sums._compat import sums_in_one_order


def rows_of_a_table(table: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, indices, table.shape[0], -1, False)


def table_at(table: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    return torch.zeros_like(table).index_put((indices,), gradient * 2, accumulate=True) + table


def in_float64(table: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    total = torch.zeros(table.shape, dtype=torch.float64)
    for row, one in zip(indices.tolist(), gradient.double(), strict=True):
        total[row] += one
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [rows_of_a_table, table_at])
def test_sums_over_repeated_indices_are_added_in_one_order(add: Any, dtype: torch.dtype, request: Any) -> None:
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(2)  # a program for one thread needs no atomic addition
    table, gradient = torch.randn(40, 64, dtype=dtype), torch.randn(3000, 64, dtype=dtype)
    indices = torch.randint(40, (3000,))
    _, code = run_and_get_code(torch.compile(add), table, indices, gradient)
    assert "atomic_add" in "".join(code), "what is replaced: torch adds in the order of its threads"
    torch.compiler.reset()
    with sums_in_one_order(), fresh_cache():
        compiled = torch.compile(add)
        (got, code) = run_and_get_code(compiled, table, indices, gradient)
    for loop in re.findall(r"#pragma omp for(.*?)(?=#pragma|\Z)", "".join(code), re.DOTALL):
        assert "atomic_add" not in loop
    assert all(torch.equal(compiled(table, indices, gradient), got) for _ in range(20))
    of_it = in_float64(table, indices, gradient)
    right = of_it if add is rows_of_a_table else 2 * of_it + table.double()
    # 75 numbers of size 1 in each sum; a sum in bf16 would be some per cent off, as torch's own table_at is there.
    loose = 1e-2 if add is rows_of_a_table else 5e-2
    assert (got.double() - right).norm() <= (loose if dtype == torch.bfloat16 else 1e-6) * right.norm()


def test_sums_are_torchs_again_afterwards() -> None:
    from torch._inductor import decomposition, lowering
    from torch._inductor.codegen import cpp

    operator = torch.ops.aten.embedding_dense_backward.default
    tables = (decomposition.decompositions, decomposition.fast_random_decomps())

    def state() -> list[Any]:
        return [*(t[operator] for t in tables), lowering.index_put_impl_, cpp.LoopNest.max_parallel_depth]

    before = state()
    with sums_in_one_order():
        assert all(one is not other for one, other in zip(before, state(), strict=True))
    assert all(one is other for one, other in zip(before, state(), strict=True))
