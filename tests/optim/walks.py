"""One transform by itself, without a training step: on the Bowl beside its twin, and the laws that each must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from fusion_compile.optim._transform import BankInfo, Place
from tests.oracles import protocol
from tests.oracles.protocol import Oracle, float64_copies
from tests.problems import BowlGradient


def numbers(transform: Transform, dtype: torch.dtype = torch.float64, **changed: float) -> Context:
    values = {n: changed.get(n, v(0) if callable(v) else v) for n, v in transform.hyperparameters.items()}
    return Context({n: torch.tensor(v, dtype=dtype) for n, v in values.items()})


class Walk:
    """Tensors under one transform: ``walk(grads, lr=…)`` gives the updates, and adds them to `params`."""

    def __init__(self, transform: Transform, params: Tensors) -> None:
        self.transform, self.params, self.state = transform, params, transform.init(params)

    def __call__(self, grads: Tensors, **changed: float) -> Tensors:
        dtype = next(iter(self.params.values())).dtype
        context = numbers(self.transform, dtype, **changed)
        updates, self.state = self.transform.update(grads, self.state, self.params, context)
        self.params = {k: p + updates[k] for k, p in self.params.items()}
        return updates


def to_torch(named: protocol.Tensors, dtype: torch.dtype = torch.float64) -> Tensors:
    return {n: torch.from_numpy(a.copy()).to(dtype) for n, a in named.items()}


def distance(
    transform: Transform, twin: Callable[[protocol.Tensors], Oracle], dtype: torch.dtype, names: tuple[str, ...]
) -> float:
    """How far transform and twin end apart after 100 steps on the Bowl's tensors `names`, each taking its gradients at
    its own weights: the largest of ``‖difference‖ / ‖displacement‖``."""
    gradient = BowlGradient()
    start = {n: gradient.start[n] for n in names}
    oracle, walk = twin(start), Walk(transform, to_torch(start, dtype))
    for update in range(1, 101):
        walk(to_torch(gradient(float64_copies(walk.params), update), dtype))
        oracle.step(gradient(oracle.gradient_point(), update))
    found, wanted = float64_copies(walk.params), oracle.weights()
    return max(float(np.linalg.norm(found[n] - w) / np.linalg.norm(w - start[n])) for n, w in wanted.items())


def keeps_the_laws(transform: Transform, params: Tensors) -> None:
    """Pure, its own memory, structure and dtype kept, finite on odd gradients."""
    torch.manual_seed(0)
    dtype = next(iter(params.values())).dtype
    context, state = numbers(transform, dtype), transform.init(params)
    taken = [p.untyped_storage().data_ptr() for p in params.values()]
    taken += [t.untyped_storage().data_ptr() for _, t in flatten(state)]
    assert len(taken) == len(set(taken)), "state shares memory with the parameters or with itself"

    grads = {k: torch.randn_like(p) for k, p in params.items()}
    _, state = transform.update(grads, state, params, context)
    given = {"g": grads, "p": params, "s": state, "h": dict(context.hyperparameters)}
    before = {at: t.clone() for at, t in flatten(given)}
    updates, after = transform.update(grads, state, params, context)
    assert all(torch.equal(before[at], t) for at, t in flatten(given)), "an argument was changed"
    for t in [*updates.values(), *(t for _, t in flatten(after))]:
        t.add_(1)  # an alias into the arguments would show in what follows
    again, _ = transform.update(grads, state, params, context)
    assert all(torch.equal(again[k] + 1.0, u) for k, u in updates.items())

    def leaves(tree: Any) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(at, tuple(t.shape), t.dtype) for at, t in flatten(tree)]

    assert leaves(after) == leaves(state) == leaves(transform.init(params))
    assert leaves(updates) == leaves(params) and {d for _, _, d in leaves(after)} <= {dtype, torch.int64}

    odd = [lambda g: torch.zeros_like(g), lambda g: 1e-9 * g, lambda g: 1e4 * g, _dead_row]
    for kind in odd:
        walk = Walk(transform, params)
        for _ in range(5):
            walk({k: kind(torch.randn_like(p)) for k, p in params.items()})
        assert all(bool(torch.isfinite(t).all()) for _, t in flatten((walk.params, walk.state)))


def _dead_row(g: torch.Tensor) -> torch.Tensor:
    return g * (torch.arange(g.shape[0]) > 0).view(-1, *[1] * (g.ndim - 1))


def a_bank_moves_as_its_members(make: Callable[[], Transform], k: int = 3) -> None:
    """Bit for bit in float64 but for the order of additions."""
    torch.manual_seed(1)
    bank = torch.randn(k, 12, 20, dtype=torch.float64)
    stacked = Walk(make(), {"spectral/12x20": bank})
    alone = [Walk(make(), {"w": m.clone()}) for m in bank]
    for _ in range(5):
        g = torch.randn_like(bank)
        stacked({"spectral/12x20": g})
        for walk, own in zip(alone, g, strict=True):
            walk({"w": own})
    together = torch.stack([walk.params["w"] for walk in alone])
    torch.testing.assert_close(stacked.params["spectral/12x20"], together, rtol=1e-12, atol=1e-12)


def flat_bank(named: Tensors, step: int = 4) -> tuple[Tensors, BankInfo, Callable[[torch.Tensor], Tensors]]:
    """A flat bank with padding, as ``_state`` lays it out: the bank, what is known of it, and the way back to names."""
    members, pieces, at = [], [], 0
    for name, p in named.items():
        members.append(Place(name, tuple(p.shape), at))
        length = -(-p.numel() // step) * step
        pieces.append(torch.cat([p.reshape(-1), p.new_zeros(length - p.numel())]))
        at += length

    def back(bank: torch.Tensor) -> Tensors:
        return {m.name: bank[m.at : m.at + torch.Size(m.shape).numel()].view(m.shape) for m in members}

    return {"scalar/flat": torch.cat(pieces)}, BankInfo(tuple(members)), back


def nodes(transform: Transform, banks: Tensors) -> int:
    """Operators in the graph of one update, traced without values."""
    banks = {k: b.to("meta") for k, b in banks.items()}
    state = transform.init(banks)
    shape = form(state)
    hyperparameters = {n: torch.empty((), device="meta") for n in transform.hyperparameters}

    def update(g: Tensors, p: Tensors, s: Tensors, h: Tensors) -> tuple[Tensors, Tensors]:
        updates, after = transform.update(g, unflatten(shape, s), p, Context(h))
        return updates, dict(flatten(after))

    graph = make_fx(update)(dict(banks), dict(banks), dict(flatten(state)), hyperparameters).graph
    return sum(node.op == "call_function" for node in graph.nodes)
