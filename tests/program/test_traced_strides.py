"""Results of a region lie as they were traced, whatever the compiler chose."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._program.traced_strides import TracedStrides


def test_results_are_laid_out_anew_where_the_compiler_chose_others() -> None:
    calls: list[int] = []

    def compiled(given: list[Tensor]) -> list[Tensor]:
        calls.append(len(given))
        x = given.pop()
        return [x + 1, (x.t() + 1).contiguous().t(), x.sum()]

    x = torch.arange(6.0).reshape(2, 3)
    run = TracedStrides(compiled, [x, x, x.sum()])
    for _ in range(2):
        plain, laid_out, total = run([x])
        assert torch.equal(plain, x + 1) and torch.equal(laid_out, x + 1) and float(total) == 15.0
        assert plain.stride() == laid_out.stride() == (3, 1)
    assert calls == [1, 1]


def test_the_stride_of_an_axis_of_one_does_not_matter() -> None:
    x = torch.ones(1, 4)
    result = torch.ones(4, 1).t()
    assert TracedStrides(lambda given: [result], [x])([])[0] is result
