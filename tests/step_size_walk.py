"""Transforms that choose a step size, run by init and update alone beside their float64 twins; the laws they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile import optim
from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from tests.data.bowl import SHAPES, Bowl, noise
from tests.oracles.protocol import Given, float64_copies
from tests.problems import BowlGradient


def adam(lr: float = 1e-3) -> Transform:
    """Adam as the official ScheduleFree+ has it, with one rate."""
    return optim.chain(optim.scale_by_adam((0.9, 0.95)), optim.scale_by_learning_rate(lr), name="adam")


class Walk:
    """`transform` on tensors by name: `point()`, `step(grads, loss)`, and `live` for numbers that change."""

    def __init__(self, transform: Transform, start: Given, dtype: torch.dtype = torch.float64) -> None:
        self.transform, self.dtype = transform, dtype
        self.params = {n: torch.from_numpy(p).to(dtype) for n, p in float64_copies(start).items()}
        self.state = transform.init(self.params)
        self.live: dict[str, float] = {}

    def context(self, loss: float | None = None) -> Context:
        values = {n: v(0) if callable(v) else v for n, v in self.transform.hyperparameters.items()} | self.live
        numbers = {n: torch.tensor(v, dtype=self.dtype) for n, v in values.items()}
        return Context(numbers, None if loss is None else torch.tensor(loss, dtype=self.dtype))

    def point(self) -> Tensors:
        moves = self.transform.gradient_point
        return self.params if moves is None else moves(self.params, self.state, self.context())

    def step(self, grads: Given, loss: float | None = None) -> None:
        g = {n: torch.from_numpy(t).to(self.dtype) for n, t in float64_copies(grads).items()}
        updates, self.state = self.transform.update(g, self.state, self.params, self.context(loss))
        self.params = {n: p + updates[n] for n, p in self.params.items()}

    def told(self) -> dict[str, float]:
        assert self.transform.diagnostics is not None
        return {name: float(t) for name, t in self.transform.diagnostics(self.state).items()}


class BowlLoss:
    """The Bowl's loss from its formula, sum(h (p - t)^2 / 2 + n p), in float64."""

    def __init__(self) -> None:
        bowl = Bowl()
        self._minimum = float64_copies({n: getattr(bowl, "t_" + n) for n in SHAPES})
        self._curvature = float64_copies({n: getattr(bowl, "h_" + n) for n in SHAPES})

    def __call__(self, point: Given, update: int) -> float:
        n = float64_copies(dict(zip(SHAPES, noise(update - 1), strict=True)))
        p = float64_copies(point)
        return sum(float((self._curvature[k] * (p[k] - self._minimum[k]) ** 2 / 2 + n[k] * p[k]).sum()) for k in SHAPES)


def follow(
    walk: Walk,
    oracle: Any,
    updates: Iterable[int],
    each: Callable[[int], None] = lambda update: None,
    *,
    loss: bool = True,
) -> float:
    """Runs both on the Bowl, each with gradient (and `loss`) of its own point; the largest error of x or of the point,
    over the tensors, relative to the twin's displacement."""
    gradient, value = BowlGradient(), BowlLoss()
    for update in updates:
        each(update)
        for one in (walk, oracle):
            point = float64_copies(walk.point() if one is walk else oracle.gradient_point())
            one.step(gradient(point, update), *([value(point, update)] if loss else []))
    pairs = [
        (float64_copies(walk.params), oracle.weights()),
        (float64_copies(walk.point()), oracle.gradient_point()),
    ]
    return max(
        float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n] - gradient.start[n]))
        for found, wanted in pairs
        for n in SHAPES
    )


def banks(dtype: torch.dtype = torch.float32, k: int = 3) -> Tensors:
    return {"spectral/12x20": torch.randn(k, 12, 20, dtype=dtype), "scalar/flat": torch.randn(37, dtype=dtype)}


def _numbers(transform: Transform, dtype: torch.dtype) -> Context:
    values = {n: v(0) if callable(v) else v for n, v in transform.hyperparameters.items()}
    return Context({n: torch.tensor(v, dtype=dtype) for n, v in values.items()}, torch.tensor(2.0, dtype=dtype))


def check_laws(transform: Transform) -> None:
    """Pure, without aliases, state of one form and dtype, and as many nodes for 7 matrices as for 2."""
    for dtype in (torch.float32, torch.float64):
        params, context = banks(dtype), _numbers(transform, dtype)
        state = transform.init(params)
        own = [t.untyped_storage().data_ptr() for _, t in flatten(state)]
        assert len(own) == len(set(own)), "two state tensors share memory"
        assert not set(own) & {p.untyped_storage().data_ptr() for p in params.values()}
        _, state = transform.update({k: torch.randn_like(p) for k, p in params.items()}, state, params, context)
        grads = {k: torch.randn_like(p) for k, p in params.items()}
        given: list[Any] = [grads, params, state, dict(context.hyperparameters)]
        before = [t.clone() for tree in given for _, t in flatten(tree)]
        first, after = transform.update(grads, state, params, context)
        kept = [t for tree in given for _, t in flatten(tree)]
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "update() changed an argument"
        leaves = [[(key, t.shape, t.dtype) for key, t in flatten(tree)] for tree in (state, after)]
        assert leaves[0] == leaves[1] and {d for _, shape, d in leaves[1] if shape} <= {dtype}
        # Numbers besides: counts are whole, and a sum over all steps is fp64.
        assert {d for _, shape, d in leaves[1] if not shape} <= {dtype, torch.int64, torch.float64}
        assert [(k, u.shape, u.dtype) for k, u in first.items()] == [(k, p.shape, p.dtype) for k, p in params.items()]
        whole = transform.update(grads, state, params, context)
        for t in [*whole[0].values(), *(t for _, t in flatten(whole[1]))]:
            t.add_(1)
        kept = [t for tree in given for _, t in flatten(tree)]
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "a result is an alias of an argument"
        again = unflatten(form(after), dict(flatten(after)))
        assert [key for key, _ in flatten(again)] == [key for key, _ in flatten(after)]

    def nodes(k: int) -> int:
        params, context = banks(k=k), _numbers(transform, torch.float32)
        state = transform.init(params)

        def update(g: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
            updates, after = transform.update(g, unflatten(form(state), s), p, context)
            return updates, dict(flatten(after))

        graph = make_fx(update)(dict(params), dict(params), dict(flatten(state))).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert nodes(2) == nodes(7) > 10


def together_and_alone(transform: Callable[[], Transform]) -> tuple[Tensor, Tensor]:
    """Five updates of three stacked matrices, and of the same three under keys of their own, in float64."""
    stack = torch.randn(3, 12, 20, dtype=torch.float64)
    grads = [torch.randn_like(stack) for _ in range(5)]
    found = []
    for split in (False, True):
        given = {f"m/{i}": m.clone() for i, m in enumerate(stack)} if split else {"m": stack}
        walk = Walk(transform(), given)
        for g in grads:
            walk.step({f"m/{i}": m for i, m in enumerate(g)} if split else {"m": g}, 2.0)
        found.append(torch.stack(list(walk.params.values())) if split else walk.params["m"])
    return found[0], found[1]


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1e-9": lambda t: 1e-9 * torch.randn_like(t),
    "1e4": lambda t: 1e4 * torch.randn_like(t),
    "one row dead": lambda t: torch.randn_like(t) * (torch.arange(t.shape[-2])[:, None] > 0 if t.ndim > 1 else 1),
}


def after_odd_gradients(transform: Transform, kind: str, *, warm: bool) -> tuple[Tensors, Tensors]:
    """The banks before and after ten such gradients in fp32 (after one ordinary one where `warm`)."""
    walk = Walk(transform, banks(), torch.float32)
    before = dict(walk.params)
    if warm:
        walk.step({k: torch.randn_like(p) for k, p in before.items()}, 2.0)
    for _ in range(10):
        walk.step({k: ODD[kind](p) for k, p in before.items()}, 2.0)
    state = [t for _, t in flatten(walk.state)]
    assert all(bool(t.isfinite().all()) for t in [*walk.params.values(), *state]), kind
    return before, walk.params
