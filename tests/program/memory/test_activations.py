"""What the backward should not read from the forward is computed again there, bit for bit, when its gradient comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fusion_compile as fc
from fusion_compile._capture.by_running._compat import trace_on_fakes
from fusion_compile._compat import region
from fusion_compile._program.memory.activations import activations_kept, compute_again, share_kept, waits_to_be_needed
from fusion_compile._program.program import region_of

Forward = Callable[..., Tensor]


def two_layers(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(x @ w) @ v).square().mean()


def with_a_mask(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    return torch.tanh((h * (torch.rand_like(h) > 0.5)) @ v).square().mean()


def traced(forward: Forward) -> fx.GraphModule:
    def step(w: Tensor, v: Tensor, x: Tensor) -> list[Tensor]:
        leaves = [w.detach().requires_grad_(), v.detach().requires_grad_()]
        with torch.enable_grad():
            with region("forward"):
                loss = forward(*leaves, x)
            with region("backward"):
                found = torch.autograd.grad(loss, leaves)
        with region("optimizer"):
            return [loss.detach(), *(p - 0.1 * g for p, g in zip((w, v), found, strict=True))]

    graph = trace_on_fakes(step, given(), stack_traces=False)
    graph.graph.eliminate_dead_code()
    return graph


def given() -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source) for shape in ((8, 8), (8, 8), (64, 8))]


def run(graph: fx.GraphModule) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found: list[Tensor] = graph(*given())
    return found


def read_from_the_forward(graph: fx.Graph) -> list[str]:
    """Operators of the forward whose results, also through views, the backward reads."""
    own = [n for n in graph.nodes if region_of(n) == "backward"]
    return sorted(
        str(s.target).removeprefix("aten.").removesuffix(".default")
        for s in {s for n in own for s in n.all_input_nodes if s.op == "call_function" and region_of(s) == "forward"}
    )


@pytest.mark.parametrize("forward", [two_layers, with_a_mask], ids=["plain", "random"])
@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0])
def test_the_numbers_are_the_same_bits(forward: Forward, budget: float) -> None:
    graph = traced(forward)
    want = run(graph)
    compute_again(graph.graph, budget)
    graph.graph.lint()
    graph.recompile()
    assert all(torch.equal(a, b) for a, b in zip(run(graph), want, strict=True))


def test_with_nothing_kept_products_run_again_and_with_all_they_do_not() -> None:
    products = {}
    for budget in (0.0, 1.0):
        graph = traced(two_layers).graph
        before = sum(node.target is torch.ops.aten.mm.default for node in graph.nodes)
        assert compute_again(graph, budget) > 0 or budget
        products[budget] = sum(node.target is torch.ops.aten.mm.default for node in graph.nodes) - before
        if not budget:
            assert not any(name in ("mm", "tanh") for name in read_from_the_forward(graph))
    assert products == {0.0: 2, 1.0: 0}


def test_a_mask_is_drawn_once() -> None:
    graph = traced(with_a_mask).graph
    compute_again(graph, 0.4)
    assert sum("rand_like" in str(node.target) for node in graph.nodes) == 1


def test_what_gets_memory_waits_for_a_gradient_that_comes_before_it() -> None:
    graph = traced(two_layers).graph
    compute_again(graph, 0.0)
    order = {node: i for i, node in enumerate(graph.nodes)}
    waiting = waits_to_be_needed(graph)
    assert waiting
    for node, gradient in waiting.items():
        assert region_of(gradient) == "backward" and order[gradient] < order[node]


def test_a_graph_without_a_backward_is_left_alone() -> None:
    graph = trace_on_fakes(lambda w, v, x: [x @ w @ v], given(), stack_traces=False).graph
    before = str(graph)
    assert compute_again(graph, 0.0) == 0 and str(graph) == before
    assert waits_to_be_needed(graph) == {}


def test_the_share_counts_inside_alone() -> None:
    with activations_kept(0.5):
        assert share_kept() == 0.5
        with activations_kept(None):
            assert share_kept() is None
    assert share_kept() is None


@pytest.mark.parametrize("share", [1.5, 0.0, True, "0.5"])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"is no share of activations; give a number above 0, up to 1"):
        fc.compile_training_step(nn.Linear(2, 2), two_layers, activation_memory=share)
    with pytest.raises(ValueError, match=r"activation_memory=0.5 chooses in the one graph .* mode='eager'"):
        fc.compile_training_step(nn.Linear(2, 2), two_layers, activation_memory=0.5, mode="eager")


@pytest.mark.exhaustive
def test_a_compiled_step_holds_less_and_computes_the_same() -> None:
    from benchmarks._measure import peak_of_call

    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))

    peaks, weights = [], []
    for share in (None, 0.3):
        torch.manual_seed(0)
        model = nn.Sequential(*(block() for _ in range(4)))
        x = torch.randn(1024, 32)
        step = fc.compile_training_step(
            model, lambda model, x: model(x).square().mean(), optimizer="adamw", activation_memory=share
        )
        for _ in range(2):
            step(x)  # the first two are compared with the ordinary loop
        peaks.append(peak_of_call(partial(step, x), x.device, list))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert peaks[1] < 0.75 * peaks[0]
    # Four steps of AdamW at lr 1e-3; kernels round otherwise, and a step's size does not depend on the gradient's.
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-4)
