"""The laws of a transform, for `fusionopt_compat` with everything on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Context
from fusion_compile.optim.fusionopt_compat import COMPONENTS, fusionopt_compat
from tests.optim.fusionopt_walk import (
    SMALL,
    SMALL_SPECTRAL,
    Banks,
    Run,
    SmallBowl,
    distance,
    small_run,
)
from tests.oracles.protocol import float64_copies


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("options", [{}, {"components": ("ns5", "cautious"), "hyperball": True}])
def test_update_is_pure_and_its_results_are_values(options: dict[str, Any], due: bool) -> None:
    run = small_run(**options)
    run.step(SmallBowl()(run.point(), 0)[1], 2.0)
    grads = run.banks.join(SmallBowl()(run.point(), 1)[1], run.dtype)
    context = Context(run.numbers, torch.tensor(1.5), due)
    given = [("g", grads), ("p", run.params), ("s", run.state), ("h", dict(run.numbers))]
    before = {key: t.clone() for at, tree in given for key, t in flatten(tree, at)}
    first, after = run.transform.update(grads, run.state, run.params, context)
    assert all(torch.equal(before[key], t) for at, tree in given for key, t in flatten(tree, at))
    results = [*first.values(), *(t for _, t in flatten(after))]
    memory = [t.untyped_storage().data_ptr() for t in results]
    memory += [t.untyped_storage().data_ptr() for at, tree in given for _, t in flatten(tree, at)]
    assert len(memory) == len(set(memory)), "two tensors share memory: a donated step would write one through the other"
    for t in results:
        t.add_(1)
    second, _ = run.transform.update(grads, run.state, run.params, context)
    assert all(torch.equal(second[key] + 1.0, u) for key, u in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"components": ("ns5", "snr"), "hyperball": True, "snr_mode": "elem"}])
def test_structure_shape_and_dtype_are_kept(options: dict[str, Any], dtype: torch.dtype) -> None:
    run = small_run(dtype, **options)
    before = run.state
    run.step(SmallBowl()(run.point(), 0)[1], 2.0)

    def leaves(tree: Any) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(key, tuple(t.shape), t.dtype) for key, t in flatten(tree)]

    assert leaves(run.state) == leaves(before)
    assert {d for key, _, d in leaves(before) if key != "step_count"} == {dtype}
    assert before.step_count.dtype == torch.int64
    again = unflatten(form(run.state), dict(flatten(run.state)))
    assert all(a is b for (_, a), (_, b) in zip(flatten(again), flatten(run.state), strict=True))


def test_a_bank_moves_as_its_members_alone() -> None:
    """Stacked matrices and a flat bank with boundaries, against every parameter in a bank of its own and unbound."""
    start = SmallBowl().start
    key_of = {n: f"{'spectral' if n in SMALL_SPECTRAL else 'scalar'}/{n}" for n in SMALL}
    params = {key_of[n]: torch.tensor(p) for n, p in start.items()}
    transform = fusionopt_compat(eigen_period=2, hot_dtype=torch.float64)
    together = small_run(torch.float64, hot_dtype=torch.float64)
    state = transform.init(params)
    for step in range(5):
        value, grads = SmallBowl()(together.point(), step)
        together.step(grads, value)
        context = Context(together.numbers, torch.tensor(value, dtype=torch.float64), step % 2 == 0)
        g = {key_of[n]: torch.tensor(t) for n, t in grads.items()}
        updates, state = transform.update(g, state, params, context)
        params = {k: p + updates[k] for k, p in params.items()}
    alone = {n: params[key_of[n]] for n in SMALL}
    assert distance(together.weights(), float64_copies(alone), start) <= 1e-11


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1e-9": lambda t: 1e-9 * torch.randn_like(t),
    "1e4": lambda t: 1e4 * torch.randn_like(t),
    "one row dead": lambda t: torch.randn_like(t) * (torch.arange(t.shape[0]).view(-1, *[1] * (t.ndim - 1)) > 0),
}


@pytest.mark.parametrize("hyperball", [False, True])
@pytest.mark.parametrize(
    ("kind", "hot_dtype"),
    # fp16_safe cannot hold a momentum of several times 1e4, as FusionOpt's cannot
    [(k, h) for k in GRADIENTS for h in ("fp32", "bf16", "fp16_safe") if (k, h) != ("1e4", "fp16_safe")],
)
def test_weights_stay_finite(kind: str, hot_dtype: str, hyperball: bool) -> None:
    """Everything on (or all that goes with Hyperball); Shampoo's factors of single gradients of rank 12 in 20, at 1e4
    with eigenvalues whose rounding is a thousand times the ridge."""
    components = set(COMPONENTS) - ({"sf"} if hyperball else set())
    run = small_run(components=components, hyperball=hyperball, hot_dtype=hot_dtype, weight_decay=0.0)
    torch.manual_seed(0)
    before = run.weights()
    for _ in range(6):
        run.step({n: GRADIENTS[kind](p) for n, p in run.weights().items()}, 1.0)
    for name, p in run.weights().items():
        assert bool(torch.isfinite(p).all()), name
        if kind == "zero":
            # Hyperball brings the weights back to their norm even so: one rounding a step
            torch.testing.assert_close(p, before[name], rtol=1e-6 if hyperball else 0.0, atol=0.0)


def many(k: int) -> Banks:
    shapes = {f"layers.{i}.w": (16, 24) for i in range(k)} | {f"layers.{i}.b": (16 + i,) for i in range(k)}
    return Banks(shapes, tuple(n for n in shapes if n.endswith("w")))


@pytest.mark.parametrize("due", [True, False])
def test_the_update_has_as_many_nodes_for_28_layers_as_for_4(due: bool) -> None:
    def nodes(k: int) -> int:
        banks = many(k)
        start = {n: torch.randn(s) for n, s in banks.shapes.items()}
        run = Run(fusionopt_compat(layer_update_weights={1: 0.5}), banks, start, torch.float32)
        shape = form(run.state)

        def update(g: Tensors, p: Tensors, s: Tensors, h: Tensors) -> tuple[Tensors, Tensors]:
            updates, after = run.transform.update(g, unflatten(shape, s), p, Context(h, h["lr"], due))
            return updates, dict(flatten(after))

        graph = make_fx(update)(dict(run.params), dict(run.params), dict(flatten(run.state)), run.numbers).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert nodes(4) == nodes(28) > 100


def test_it_is_one_graph_without_the_host() -> None:
    """Captured whole, twice: a step that refreshes Shampoo's roots and one that does not; then as uncompiled."""
    shapes = {n: SMALL[n] for n in ("layers.0.wide", "layers.2.wide", "gain", "bias")}
    problem, banks = SmallBowl(shapes), Banks(shapes, SMALL_SPECTRAL)
    compiled, plain = (Run(fusionopt_compat(eigen_period=2), banks, problem.start, torch.float32) for _ in range(2))

    def update(g: Tensors, s: Any, p: Tensors, h: Tensors, loss: Tensor, due: bool) -> Any:
        return compiled.transform.update(g, s, p, Context(h, loss, due))

    captured = torch.compile(update, backend="aot_eager", fullgraph=True)
    for step in range(4):
        value, grads = problem(plain.point(), step)
        g, loss = banks.join(grads, plain.dtype), torch.tensor(value, dtype=torch.float32)
        updates, compiled.state = captured(g, compiled.state, compiled.params, compiled.numbers, loss, step % 2 == 0)
        compiled.params = {k: p + updates[k] for k, p in compiled.params.items()}
        plain.step(grads, value)
    for name, p in plain.weights().items():
        torch.testing.assert_close(compiled.weights()[name], p, rtol=1e-5, atol=1e-6)
