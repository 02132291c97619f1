"""`total`: one sum over all entries, in one chain of kernels however many tensors there are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from fusion_compile.optim._total import total, total_of_rows
from fusion_compile.optim.clip_by_global_norm import global_norm
from fusion_compile.passes import lower_to_aten

SHAPES = [(), (1,), (7,), (3, 5), (2, 4, 6), (1, 1)]


@pytest.mark.parametrize("count", range(len(SHAPES) + 1))
def test_it_is_the_sum_over_all_entries(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randint(-9, 9, shape, generator=generator).float() for shape in SHAPES[:count]]
    found = total(tensors, torch.zeros(()))
    # Small integers: every order of addition gives the same fp32 number.
    assert found.shape == () and float(found) == sum(float(t.sum()) for t in tensors)


def test_a_transposed_tensor_is_summed_like_any_other() -> None:
    t = torch.arange(24.0).view(2, 3, 4)
    assert float(total([t.mT, t], torch.zeros(()))) == 2 * 276


def test_dtypes_mix_to_the_widest_and_an_empty_sum_is_the_zero_that_was_given() -> None:
    # 1 + 2^-40 is a number in fp64 only.
    found = total([torch.ones(2, 2), torch.full((1,), 2.0**-40, dtype=torch.float64)], torch.zeros(()))
    assert found.dtype == torch.float64 and float(found) == 4 + 2.0**-40
    zero = torch.zeros((), dtype=torch.float64)
    assert total([], zero) is zero and total_of_rows([], zero) is zero
    assert float(total_of_rows([torch.ones(3), torch.ones(2)], zero)) == 5


def operators(count: int) -> Counter[str]:
    """ATen calls of a captured norm over `count` banks of several shapes."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    banks = {str(i): torch.ones(2, 3 + i, 4) for i in range(count)}
    norm = torch.compile(global_norm, backend=keep)(banks)
    assert float(norm) ** 2 == pytest.approx(sum(t.numel() for t in banks.values()), rel=1e-6)  # fp32
    return Counter(str(n.target) for n in lower_to_aten(graphs[0]).graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("count", [2, 5, 12])
def test_no_sum_of_one_bank_is_added_to_another(count: int) -> None:
    """A scalar sum that is added to a scalar is what Triton 3.7 could not compile, and a launch for one number."""
    found = operators(count)
    assert found["aten.add.Tensor"] == 0
    assert found["aten.cat.default"] == 1 and found["aten.sum.default"] == 1
    assert found["aten.sum.dim_IntList"] == count
