"""Results are written over what is read for the last time, also where a bank of weights is written at the end."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

from fusion_compile._program.memory._compat import written_over_what_is_read_for_the_last_time


def step(weight: Tensor, x: Tensor) -> None:
    """A product with a weight that is written at the end; a tanh, which a CPU's kernel computes once for two uses."""
    h = x @ weight
    t = torch.tanh(x)
    g = (h @ weight) * (1 - t * t) * (1 + t)
    weight.sub_(g.T @ h, alpha=0.1)


def buffers_of_a_row(weight: Tensor, x: Tensor) -> int:
    """How many tensors of x's shape the compiled step allocates."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    without_caches = torch._inductor.config.patch(fx_graph_cache=False)
    with without_caches, torch._functorch.config.patch(enable_autograd_cache=False):
        _, code = run_and_get_code(compiled, weight, x)
    shape = re.escape(str(tuple(x.shape)))
    return len(re.findall(rf"empty_strided_cpu\({shape}", "\n".join(code)))


def given() -> tuple[Tensor, Tensor]:
    return torch.full((8, 8), 0.1), torch.linspace(-1, 1, 48).reshape(6, 8)


def test_a_result_takes_the_place_of_the_product_that_it_is_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is allocated does not depend on what the kernels write, and the C++ compiler takes its time.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *given, **named: lambda *tensors: None)
    assert buffers_of_a_row(*given()) == 3  # h, h @ w, and one for the result
    with written_over_what_is_read_for_the_last_time():
        assert buffers_of_a_row(*given()) == 2


@pytest.mark.exhaustive
def test_the_numbers_are_the_same() -> None:
    (ours, x), (theirs, _), (want, _) = given(), given(), given()
    step(want, x)
    buffers_of_a_row(theirs, x)
    with written_over_what_is_read_for_the_last_time():
        buffers_of_a_row(ours, x)
    torch.testing.assert_close(ours, want)
    assert torch.equal(ours, theirs)
