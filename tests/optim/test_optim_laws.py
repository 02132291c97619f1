"""What holds for every recipe: purity, structure, banks, donation, one graph, live numbers, odd gradients, descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dit import DiT
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile import TrainingStep, compile_training_step, optim
from fusion_compile._state.banks import build_layout
from fusion_compile._state.flat_tree import flatten, form, unflatten
from fusion_compile._state.routing import route
from fusion_compile._step.carried import Carried
from fusion_compile._step.loss import LossModule, examine
from fusion_compile._step.pure_step import Form, pure_step
from fusion_compile._step.update import pure_periodic
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from tests.data.bowl import SHAPES, Bowl, loss_fn, noise

RECIPES = tuple(optim.RECIPES)
WITH_MATMUL_DTYPE = ("muon", "normuon", "sf_normuon", "full_fusion")
SPECTRAL_SHAPES = {"spectral/12x20": (12, 20), "spectral/20x12": (20, 12)}


def make(name: str, **options: Any) -> Transform:
    """A recipe with a Newton-Schulz in fp32 where it has one."""
    if name in WITH_MATMUL_DTYPE:
        options = {"matmul_dtype": torch.float32, **options}
    return optim.RECIPES[name](**options)


def numbers(transform: Transform, dtype: torch.dtype = torch.float32) -> Context:
    values = {}
    for name, value in transform.hyperparameters.items():
        values[name] = torch.tensor(value(0) if callable(value) else value, dtype=dtype)
    return Context(values)


def random_banks(transform: Transform, dtype: torch.dtype = torch.float32, k: int = 3) -> Tensors:
    """Stacked matrices where the transform takes them, and a flat vector."""
    banks = {"scalar/flat": torch.randn(37, dtype=dtype)}
    if "spectral" in transform.roles:
        banks |= {key: torch.randn(k, *shape, dtype=dtype) for key, shape in SPECTRAL_SHAPES.items()}
    return banks


def like(banks: Tensors, scale: float = 1.0) -> Tensors:
    return {key: scale * torch.randn_like(b) for key, b in banks.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, where a metric is not a number too."""
    return a.dtype == b.dtype and bool(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def run(transform: Transform, params: Tensors, gradients: Iterator[Tensors]) -> Tensors:
    """The parameters after the given gradients, by init and update alone."""
    state, context = transform.init(params), numbers(transform)
    for g in gradients:
        updates, state = transform.update(g, state, params, context)
        params = {key: p + updates[key] for key, p in params.items()}
    return params


# -- a transform is a pair of pure functions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_update_leaves_its_arguments_alone_bitwise(name: str) -> None:
    transform = make(name)
    params = random_banks(transform)
    context, grads, state = numbers(transform), like(params), transform.init(params)
    _, state = transform.update(like(params), state, params, context)  # a state that is not all zeros
    given = [("g", grads), ("p", params), ("s", state), ("h", dict(context.hyperparameters))]
    before = {key: t.clone() for at, tree in given for key, t in flatten(tree, at)}
    first, first_state = transform.update(grads, state, params, context)
    after = {key: t for at, tree in given for key, t in flatten(tree, at)}
    assert all(torch.equal(before[key], t) for key, t in after.items())
    # The same arguments give the same results; and what comes back is a value, not an alias into the state.
    # What a transform hands back untouched (a basis renewed now and then) is the argument itself, and not written.
    own = {id(t) for _, t in flatten(state)}
    for t in [*first.values(), *(t for _, t in flatten(first_state) if id(t) not in own)]:
        t.add_(1.0)
    second, _ = transform.update(grads, state, params, context)
    assert all(torch.equal(second[key] + 1.0, u) for key, u in first.items())
    if transform.gradient_point is not None:
        point = transform.gradient_point(params, state, context)
        assert not any(torch.equal(point[key], p) for key, p in params.items())
        assert all(torch.equal(before[f"p/{key}"], p) for key, p in params.items())


@pytest.mark.parametrize("name", RECIPES)
def test_init_does_not_share_memory_with_the_parameters(name: str) -> None:
    transform = make(name)
    params = random_banks(transform)
    taken = {p.untyped_storage().data_ptr() for p in params.values()}
    own = [t.untyped_storage().data_ptr() for _, t in flatten(transform.init(params))]
    assert not taken & set(own)
    assert len(own) == len(set(own)), "two state tensors share memory: a donated step would write one through the other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RECIPES)
def test_structure_shape_and_dtype_are_kept(name: str, dtype: torch.dtype) -> None:
    transform = make(name)
    params = random_banks(transform, dtype)
    state = transform.init(params)
    updates, after = transform.update(like(params), state, params, numbers(transform, dtype))

    def leaves(tree: Any) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(key, tuple(t.shape), t.dtype) for key, t in flatten(tree)]

    assert leaves(after) == leaves(state)
    assert leaves(updates) == leaves(params)
    assert {d for _, shape, d in leaves(after) if shape} <= {dtype}
    # Numbers besides: counts are whole, and a sum over all steps is fp64.
    assert {d for _, shape, d in leaves(after) if not shape} <= {dtype, torch.int64, torch.float64}
    again = unflatten(form(state), dict(flatten(after)))  # a trip through the flat dictionary
    assert all(a is b for (_, a), (_, b) in zip(flatten(again), flatten(after), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_bank_moves_as_its_members_alone(name: str) -> None:
    transform, k = make(name), 3
    banks = random_banks(transform, k=k)
    gradients = [like(banks) for _ in range(5)]

    def apart(tensors: Tensors) -> Tensors:
        """Matrices one by one under their own keys; the flat vector in three pieces."""
        parts: Tensors = {}
        for key, t in tensors.items():
            members = t.unbind(0) if t.ndim == 3 else t.split(15)
            parts |= {f"{key}/{i}": member.clone() for i, member in enumerate(members)}
        return parts

    together = apart(run(transform, banks, iter(gradients)))
    alone = run(transform, apart(banks), iter([apart(g) for g in gradients]))
    assert list(together) == list(alone)
    for key, t in alone.items():
        # fp32 through Newton-Schulz: other matmul kernels round differently (6e-8), times its slope at zero (500)
        torch.testing.assert_close(together[key], t, rtol=1e-5, atol=1e-5)


# -- the donated program is the pure one ------------------------------------------------------------------------------


def bowl_step(name: str, recipe: dict[str, Any] | None = None, **options: Any) -> TrainingStep:
    return compile_training_step(
        Bowl(), loss_fn, optimizer=make(name, **(recipe or {})), **{"mode": "eager", **options}
    )


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in RECIPES), ("adamw", True), ("sf_normuon", True)]
)
def test_the_donated_run_is_the_pure_run_bitwise(name: str, compiled: bool) -> None:
    """Five steps with clipping, the third one with an infinite gradient, which changes nothing but the count."""
    mode = {"mode": None, "backend": "aot_eager"} if compiled else {"mode": "eager"}
    step = bowl_step(name, clip_grad_norm=1.0, **mode)
    plan, batches = step._plan, [noise(i) for i in range(5)]
    batches[2] = (torch.full_like(batches[2][0], torch.inf), *batches[2][1:])
    pure = {key: t.clone() for key, t in step._state.items()}
    weights = step.layout.views({b.key: pure[f"params/{b.key}"] for b in step.layout.banks})
    facts = examine(step.model, loss_fn, weights, batches[0], None, Carried())
    advance = pure_step(plan, LossModule(step.model, loss_fn), facts, Carried(), Form())
    for i, batch in enumerate(batches):
        given = {key: t.clone() for key, t in pure.items()}
        new = advance(pure, batch)
        assert all(same(t, given[key]) for key, t in pure.items()), "the pure step wrote into its argument"
        pure = {**pure, **{key: t.detach() for key, t in new.items()}}
        for work in step.transform.periodic:
            if i == 0 and work.first is not None:
                pure |= pure_periodic(plan.update, work.first)(pure)
        addresses = {key: t.data_ptr() for key, t in step._state.items()}
        step(*batch)
        assert addresses == {key: t.data_ptr() for key, t in step._state.items()}
        differing = [k for k, t in step._state.items() if not same(t, pure[k])]
        assert not differing, (i, differing)
        if i == 2:
            kept = [k for k in given if k.startswith(("params/", "optimizer/")) and not torch.equal(given[k], pure[k])]
            assert not kept, kept
    assert (int(step.metrics["step"]), int(step.metrics["skipped"])) == (4, 1)


# -- one graph, whatever changes and however deep ---------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.covering("adamw", "sf_normuon")
def test_one_graph_and_no_recompile_while_lr_decay_and_clip_change_every_step(name: str) -> None:
    step = bowl_step(name, mode=None, backend="aot_eager", clip_grad_norm=1.0)
    changing = [h for h in step.hyperparameters if h.endswith(("lr", "weight_decay", "clip_grad_norm"))]
    assert {"lr", "weight_decay", "clip_grad_norm"} <= set(changing)
    # What runs now and then is compiled when it first runs.
    ready = 1 + max((work.every for work in step.transform.periodic), default=0)
    for i in range(ready):
        step(*noise(i))
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(ready, 50):
            for j, hyperparameter in enumerate(changing):
                step.hyperparameters[hyperparameter] = 1e-3 * (1 + i + j)
            step(*noise(i))
            assert float(step.metrics["lr"]) == pytest.approx(step.hyperparameters["lr"], rel=1e-6)  # fp32
    assert len(step.programs) == 1
    assert int(step.metrics["step"]) == 50


def meta_dit(depth: int) -> nn.Module:
    with torch.device("meta"):
        return DiT(hidden_size=128, depth=depth)


def update_nodes(transform: Transform, depth: int) -> int:
    """Calls in the traced update over the banks of a DiT of that depth; nothing is computed."""
    model = meta_dit(depth)
    layout = build_layout(model, route(model, transform.roles or ("scalar",)))
    banks = layout.join({n: p.detach() for n, p in model.named_parameters()})
    hyperparameters = {n: torch.empty((), device="meta") for n in transform.hyperparameters}
    state = transform.init(banks)
    shape = form(state)

    def update(g: Tensors, p: Tensors, s: Tensors, h: Tensors) -> tuple[Tensors, Tensors]:
        updates, after = transform.update(g, unflatten(shape, s), p, Context(h))
        return updates, dict(flatten(after))

    graph = make_fx(update)(dict(banks), dict(banks), dict(flatten(state)), hyperparameters).graph
    return sum(node.op == "call_function" for node in graph.nodes)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.covering("adamw", "sf_normuon", "soap")
def test_the_update_has_as_many_nodes_for_28_layers_as_for_4(name: str) -> None:
    transform = make(name, matmul_dtype=torch.bfloat16) if name in WITH_MATMUL_DTYPE else make(name)
    few, many = update_nodes(transform, 4), update_nodes(transform, 28)
    assert few == many > 10


# -- numbers are live -------------------------------------------------------------------------------------------------


def rates(step: TrainingStep) -> list[str]:
    return [h for h in step.hyperparameters if h.endswith("lr")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_scheduled_lr_is_live(name: str) -> None:
    """Zero for two steps, during which no bit of the weights changes; then they move."""
    step = bowl_step(name)
    for rate in rates(step):
        step.hyperparameters[rate] = lambda taken: 0.0 if taken < 2 else 1e-2
    start = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    for i in range(3):
        step(*noise(i))
        moved = [n for n, p in step.model.named_parameters() if not torch.equal(p, start[n])]
        assert moved == ([] if i < 2 else list(SHAPES))
        assert float(step.metrics["lr"]) == pytest.approx(0.0 if i < 2 else 1e-2)


class Slope(nn.Module):
    """One vector with the gradient 1 everywhere, so that a bias-corrected Adam moves by lr exactly."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5, dtype=dtype))

    def forward(self, one: Tensor) -> Tensor:
        return (self.w * one).sum()


def test_adamw_on_a_slope_walks_the_sum_of_its_learning_rates() -> None:
    model, schedule = Slope(), optim.cosine(1e-2, total_steps=20, warmup_steps=5)
    step = compile_training_step(model, loss_fn, optimizer=optim.adamw(schedule, weight_decay=0.0), mode="eager")
    for _ in range(20):
        step(torch.ones(()))
    walked = sum(schedule(i) for i in range(20))
    # 20 roundings of a weight near 1, each up to 6e-8
    assert model.w.detach() == pytest.approx(torch.full((5,), 1 - walked), abs=2e-6)


def test_bf16_parameters_keep_an_fp32_master_so_that_tiny_updates_are_not_lost() -> None:
    """60 steps of 1e-4 from 1: in bf16, whose next number below is 1 - 2^-8 = 0.996, each alone is rounded away."""
    assert torch.tensor(1.0, dtype=torch.bfloat16) - 1e-4 == 1.0
    model = Slope(torch.bfloat16)
    step = compile_training_step(model, loss_fn, optimizer=optim.adamw(1e-4, weight_decay=0.0), mode="eager")
    for _ in range(60):
        step(torch.ones((), dtype=torch.bfloat16))
    master = step.gradient_point()["w"]
    assert master.dtype == torch.float32
    assert master == pytest.approx(torch.full((5,), 1 - 60e-4), abs=4e-6)  # 60 roundings of 6e-8
    assert torch.equal(model.w, master.bfloat16()) and bool((model.w < 1).all())


# -- odd gradients, and the point of it all ---------------------------------------------------------------------------

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "1e-9": lambda t: 1e-9 * torch.randn_like(t),
    "1e4": lambda t: 1e4 * torch.randn_like(t),
    "one row dead": lambda t: t * (torch.arange(t.shape[-2])[:, None] > 0) if t.ndim > 1 else t,
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("matmul_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WITH_MATMUL_DTYPE)
def test_weights_stay_finite_in_every_matmul_dtype(name: str, matmul_dtype: torch.dtype, kind: str) -> None:
    """Ten steps of that gradient after one ordinary one, and ten from a fresh start."""
    transform = make(name, matmul_dtype=matmul_dtype, weight_decay=0.0)
    params = random_banks(transform)
    for warm in (True, False):
        gradients = [like(params)] * warm + [{k: GRADIENTS[kind](p) for k, p in params.items()} for _ in range(10)]
        after = run(transform, params, iter(gradients))
        lr = transform.hyperparameters["lr"]
        assert isinstance(lr, float)
        for key, p in after.items():
            assert bool(torch.isfinite(p).all()), key
            if key.startswith("spectral/"):
                # No step of these recipes has a root mean square above 1.5 lr, whatever the gradient
                assert float((p - params[key]).square().mean().sqrt()) <= 1.5 * lr * len(gradients), key
        if kind == "zero" and not warm:
            assert all(torch.equal(p, params[key]) for key, p in after.items())


@pytest.mark.parametrize("kind", ["zero", "1e-9", "1e4"])
@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
def test_elementwise_recipes_stay_finite(name: str, kind: str) -> None:
    transform = make(name, weight_decay=0.0)
    params = random_banks(transform)
    after = run(transform, params, iter([{k: GRADIENTS[kind](p) for k, p in params.items()} for _ in range(10)]))
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    assert all(torch.equal(p, params[k]) == (kind == "zero") for k, p in after.items())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_downhill_on_a_quadratic(name: str) -> None:
    """To a tenth of the loss above the minimum's, which is zero, within 150 steps.

    MONA's slow average at its own β of 0.99 is over 100 steps long and still remembers the first ones by then.
    """
    step = bowl_step(name, {"mona_beta": 0.9} if name == "full_fusion" else {})
    for rate in rates(step):
        in_spectral_norm = rate == "lr" and name in ("muon", "normuon")
        step.hyperparameters[rate] = optim.linear(0.05 if in_spectral_norm else 1e-2, total_steps=150)
    step.hyperparameters["weight_decay"] = 0.0
    still = tuple(torch.zeros(shape) for shape in SHAPES.values())
    first = float(step(*still))
    for _ in range(149):
        last = float(step(*still))
    assert math.isfinite(last) and 0 <= last < 0.1 * first, (first, last)
