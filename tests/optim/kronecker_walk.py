"""Kronecker preconditioners by themselves: problems, a driver, and the laws that each must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from tests.data.bowl import SHAPES, SPECTRAL, Bowl, noise, start_of
from tests.oracles.protocol import Oracle, float64_copies


class Driver:
    """`transform` on its own: ``params -= lr * update``, then its periodic work as the training step does it, on a
    count of updates. `decay`: after the step and not in update 1, as the official codes have it."""

    def __init__(self, transform: Transform, params: Tensors, lr: float = 1.0, *, decay: float = 0.0) -> None:
        self.transform, self.params, self.lr = transform, {k: p.clone() for k, p in params.items()}, lr
        self.decay, self.updates = decay, 0
        dtype = next(iter(params.values())).dtype
        numbers = {n: v(0) if callable(v) else v for n, v in transform.hyperparameters.items()}
        self.context = Context({n: torch.tensor(v, dtype=dtype) for n, v in numbers.items()})
        self.state: Any = transform.init(self.params)

    def step(self, gradients: Tensors) -> Tensors:
        self.updates += 1
        updates, self.state = self.transform.update(gradients, self.state, self.params, self.context)
        for k, p in self.params.items():
            p.add_(updates[k], alpha=-self.lr)
            if self.updates > 1:
                p.add_(p, alpha=-self.lr * self.decay)
        for work in self.transform.periodic:
            if self.updates == 1 and work.first is not None:
                self.state = work.first(self.state, self.params, self.context)
            elif work.is_due(self.updates):
                self.state = work.update(self.state, self.params, self.context)
        return updates


class Quadratic:
    """Matrices in a random quadratic with noise: the gradient is ``h (p - t) + noise(update)``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        draw = np.random.default_rng(3)
        self.dtype, self.shapes = dtype, shapes
        self.start = {k: self._draw(draw, s) for k, s in shapes.items()}
        self.minimum = {k: self._draw(draw, s) for k, s in shapes.items()}
        self.curvature = {k: self._draw(draw, s).abs() for k, s in shapes.items()}

    def gradient(self, params: Tensors, update: int) -> Tensors:
        draw = np.random.default_rng([4, update])
        return {
            k: self.curvature[k] * (p - self.minimum[k]) + 0.3 * self._draw(draw, self.shapes[k])
            for k, p in params.items()
        }

    def _draw(self, draw: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.tensor(draw.standard_normal(shape), dtype=torch.float64).to(self.dtype)


SMALL: dict[str, tuple[int, ...]] = {"square": (16, 16), "tall": (20, 12), "wide": (12, 20)}


def follow(
    driver: Driver, oracle: Oracle, problem: Quadratic, updates: int, after_first: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Runs both from the same gradients' formula, each at its own point; error relative to the displacement."""
    for u in range(1, updates + 1):
        driver.step(problem.gradient(driver.params, u))
        point = {k: torch.from_numpy(p) for k, p in oracle.gradient_point().items()}
        exact = Quadratic(problem.shapes, torch.float64)
        oracle.step(exact.gradient(point, u))
        if u == 1:
            after_first()
    found, wanted, start = float64_copies(driver.params), oracle.weights(), float64_copies(problem.start)
    return {k: float(np.linalg.norm(found[k] - w) / np.linalg.norm(w - start[k])) for k, w in wanted.items()}


def bowl_driver(transform: Transform, lr: float, **options: Any) -> tuple[Driver, Callable[[int], None]]:
    """The official problem's matrices under `transform`; the second value takes update u."""
    bowl, start = Bowl(), start_of(Bowl())
    driver = Driver(transform, {k: start[k] for k in SPECTRAL}, lr, **options)

    def advance(update: int) -> None:
        n = dict(zip(SHAPES, noise(update - 1), strict=True))
        h, t = ({k: bowl.get_buffer(f"{letter}_{k}") for k in driver.params} for letter in "ht")
        driver.step({k: h[k] * (p - t[k]) + n[k] for k, p in driver.params.items()})

    return driver, advance


def hand_over_bases(driver: Driver, oracle: Any, factors_of: Callable[[Any], Any], names: Iterable[str]) -> None:
    """The twin gets the transform's first bases: a singular factor (tall, wide) has null vectors of no definite
    direction, and in fp32 close eigenvalues have none either. That they do diagonalize is asserted here."""
    f = factors_of(driver.state)
    for k in names:
        sides = []
        for s, q in ((f.left[k], f.left_basis[k]), (f.right[k], f.right_basis[k])):
            diagonal = q.mT @ s @ q
            n, eps = s.size(-1), torch.finfo(s.dtype).eps
            torch.testing.assert_close(q.mT @ q, torch.eye(n, dtype=s.dtype), rtol=0, atol=n * eps)
            torch.testing.assert_close(diagonal, diagonal.diag().diag(), rtol=0, atol=n * eps * float(s.trace()))
            assert bool((diagonal.diag().diff() <= n * eps * float(s.trace())).all()), "eigenvalues do not fall"
            sides.append(np.linalg.qr(float64_copies({"q": q})["q"]).Q)  # orthonormal in float64 too
        oracle.bases[k] = (sides[0], sides[1])


def roots_of(f: Any, side: str, key: str = "w") -> Tensor:
    """S^(-1/2) from basis and eigenvalues."""
    q, root = getattr(f, side + "_basis")[key], getattr(f, side + "_root")[key]
    whole: Tensor = q @ root.diag() @ q.mT
    return whole


BANKS: dict[str, tuple[int, ...]] = {"spectral/12x20": (12, 20), "spectral/20x12": (20, 12)}


def check_purity_and_form(transform: Transform, dtype: torch.dtype) -> None:
    """Nothing given is changed, by an update or by periodic work; the state keeps its form, shares no memory with the
    parameters and not with itself."""
    params = {k: torch.randn(3, *shape, dtype=dtype) for k, shape in BANKS.items()}
    driver = Driver(transform, params)
    own = [t for _, t in flatten(driver.state)]
    assert len({t.untyped_storage().data_ptr() for t in [*own, *driver.params.values()]}) == len(own) + len(params)
    shape_of = {path: (tuple(t.shape), t.dtype, t.is_contiguous()) for path, t in flatten(driver.state)}
    assert {d for _, d, _ in shape_of.values()} == {dtype}
    for _ in range(3):
        driver.step({k: torch.randn_like(p) for k, p in params.items()})

    state, context = driver.state, driver.context
    works: list[Callable[[], Any]] = [
        lambda: transform.update({k: p.clone() for k, p in params.items()}, state, params, context)[1]
    ]
    for work in transform.periodic:
        works += [lambda f=f: f(state, params, context) for f in (work.first, work.update) if f is not None]  # type: ignore[misc]
    before = {path: t.clone() for path, t in flatten(state)}
    start = {k: p.clone() for k, p in params.items()}
    for do in works:
        once, twice = dict(flatten(do())), dict(flatten(do()))
        assert all(torch.equal(t, before[path]) for path, t in flatten(state))
        assert all(torch.equal(p, start[k]) for k, p in params.items())
        assert all(torch.equal(t, twice[path]) for path, t in once.items())
        assert {path: (tuple(t.shape), t.dtype, t.is_contiguous()) for path, t in once.items()} == shape_of
        assert len({t.untyped_storage().data_ptr() for t in once.values()}) == len(once)
    assert list(dict(flatten(unflatten(form(state), before)))) == list(before)


def check_a_bank_moves_as_its_members(
    make: Callable[[], Transform], tolerance: float, banks: dict[str, tuple[int, ...]] = BANKS
) -> None:
    """In float64, where batched and single kernels differ by 1e-16 and what the method makes of it."""
    problem = Quadratic({k: (3, *shape) for k, shape in banks.items()}, torch.float64)
    alone_shapes = {f"{k}/{i}": shape for k, shape in banks.items() for i in range(3)}
    together = Driver(make(), problem.start, 0.01)
    alone = Driver(make(), {key: problem.start[key[:-2]][int(key[-1])] for key in alone_shapes}, 0.01)
    for u in range(1, 24):
        g = problem.gradient(problem.start, u)
        together.step(g)
        alone.step({key: g[key[:-2]][int(key[-1])] for key in alone_shapes})
    for key, p in alone.params.items():
        torch.testing.assert_close(together.params[key[:-2]][int(key[-1])], p, rtol=0, atol=tolerance)


def check_nodes_and_capture(transform: Transform) -> None:
    """Update and periodic work are traced without a host read, and with as many nodes for 2 matrices as for 9."""

    def nodes(k: int) -> list[int]:
        params = {key: torch.randn(k, *shape) for key, shape in BANKS.items()}
        driver = Driver(transform, params)
        shape = form(driver.state)

        def update(g: Tensors, p: Tensors, s: Tensors, h: Tensors) -> tuple[Tensors, Tensors]:
            updates, after = transform.update(g, unflatten(shape, s), p, Context(h))
            return updates, dict(flatten(after))

        def refresh(p: Tensors, s: Tensors, h: Tensors) -> list[Tensors]:
            return [dict(flatten(w.update(unflatten(shape, s), p, Context(h)))) for w in transform.periodic]

        state, numbers = dict(flatten(driver.state)), dict(driver.context.hyperparameters)
        graphs = [
            make_fx(update, tracing_mode="fake")(dict(params), dict(params), state, numbers).graph,
            make_fx(refresh, tracing_mode="fake")(dict(params), state, numbers).graph,
        ]
        names = {str(node.target) for graph in graphs for node in graph.nodes}
        assert not any("eigh" in n or "local_scalar" in n for n in names)
        return [sum(node.op == "call_function" for node in graph.nodes) for graph in graphs]

    few = nodes(2)
    assert few == nodes(9) and min(few) > 5


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1e-9": lambda t: 1e-9 * torch.randn_like(t),
    "1e4": lambda t: 1e4 * torch.randn_like(t),
    "one row dead": lambda t: torch.randn_like(t) * (torch.arange(t.shape[-2])[:, None] > 0),
}


def check_odd_gradients(transform: Transform, kind: str) -> None:
    """Twelve such gradients, from a fresh start and after one ordinary one: weights and state stay finite."""
    torch.manual_seed(0)
    params = {k: torch.randn(3, *shape) for k, shape in BANKS.items()}
    for warm in (False, True):
        driver = Driver(transform, params, 1e-3)
        if warm:
            driver.step({k: torch.randn_like(p) for k, p in params.items()})
        for _ in range(12):
            driver.step({k: GRADIENTS[kind](p) for k, p in params.items()})
        assert all(bool(torch.isfinite(t).all()) for _, t in flatten(driver.state))
        assert all(bool(torch.isfinite(p).all()) for p in driver.params.values())
        if kind == "zero" and not warm:
            assert all(torch.equal(p, params[k]) for k, p in driver.params.items())


def check_descent(transform: Transform, lr: float) -> None:
    """A noiseless quadratic, to a hundredth of its loss in 300 updates of falling lr."""
    problem = Quadratic(SMALL, torch.float32)
    driver = Driver(transform, problem.start, lr)

    def loss() -> float:
        parts = (problem.curvature[k] * (p - problem.minimum[k]).square() for k, p in driver.params.items())
        return float(sum(part.sum() for part in parts))

    first = loss()
    for u in range(300):
        driver.lr = lr * (1 - u / 300)
        driver.step({k: problem.curvature[k] * (p - problem.minimum[k]) for k, p in driver.params.items()})
    assert loss() < 0.01 * first, (first, loss())
