"""lower_by_region: as many regions compiled at any depth, called directly, with the graph's own results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code

from fusion_compile._capture.by_running.trace import run_on_fakes
from fusion_compile._compat import region
from fusion_compile._program.program import CompiledRegion
from fusion_compile._program.regions import ByRegion, lower_by_region
from fusion_compile._program.shared_regions import SharedRegions

WIDTH = 4


def block(x: Tensor, w: Tensor) -> Tensor:
    """Nine kernels."""
    h = torch.tanh(x @ w) * 0.5
    return x + torch.sigmoid(h.exp() + h.cos()).sin()


def step(bank: Tensor, x: Tensor) -> list[Tensor]:
    """Blocks with weights in one bank, forward and backward, and an update in place."""
    with torch.enable_grad():
        weights = [w.detach().requires_grad_() for w in bank.unbind()]
        with region("forward"):
            for w in weights:
                x = block(x, w)
            loss = x.square().mean()
        with region("backward"):
            found = torch.autograd.grad(loss, weights)
    gradient = torch.stack(found)
    norm = gradient.square().sum().sqrt()
    bank.copy_(bank - 0.1 * gradient / norm)
    return [loss.detach(), norm]


def inputs(depth: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(depth, WIDTH, WIDTH, generator=source), torch.randn(3, WIDTH, generator=source)]


def captured(depth: int) -> fx.GraphModule:
    return run_on_fakes(step, dict(zip(("state/bank", "batch/0"), inputs(depth), strict=True)))


def lowered(depth: int, backend: str) -> ByRegion:
    shared = SharedRegions("default", backend)
    return lower_by_region(captured(depth), inputs(depth), shared, mode="default", backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_computes_and_writes_the_bits_of_the_graph(backend: str) -> None:
    got, want = inputs(3), inputs(3)
    with torch.no_grad():
        results = lowered(3, backend).run(*got), step(*want)
    for a, b in zip([*got, *results[0]], [*want, *results[1]], strict=True):
        assert torch.equal(a, b)


def test_the_regions_are_as_many_at_any_depth() -> None:
    def kinds(regions: tuple[CompiledRegion, ...]) -> list[tuple[bool, int, tuple[str, ...]]]:
        return [(r.repeats, r.kernels, r.parts) for r in regions]

    eight, sixteen = lowered(8, "eager").regions, lowered(16, "eager").regions
    assert kinds(eight) == kinds(sixteen)
    # The first block's backward has no input's gradient, and is not of the region.
    assert [[r.called for r in found if r.repeats] for found in (eight, sixteen)] == [[8, 7], [16, 15]]
    assert eight[-1].parts == ("state",) and not eight[-1].repeats


def test_inductor_compiles_each_region_once() -> None:
    torch.compiler.reset()
    got, want = inputs(4), inputs(4)
    program: Any = None

    def compile_and_run() -> list[Tensor]:
        nonlocal program
        program = lowered(4, "inductor")
        return program.run(*got)

    with torch.no_grad():
        results, codes = run_and_get_code(compile_and_run)
        expected = step(*want)
    assert len(codes) == len(program.regions)
    for a, b in zip([*got, *results], [*want, *expected], strict=True):
        torch.testing.assert_close(a, b)  # fused kernels round in another order


def test_an_operator_with_graphs_of_its_own_makes_it_one_program() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        return [torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))]

    x = torch.ones(2)
    shared = SharedRegions("default", "eager")
    program = lower_by_region(run_on_fakes(fn, {"batch/0": x}), [x], shared, mode="default", backend="eager")
    assert program.regions == () and torch.equal(program.run(x)[0], x.sin())
