"""`cautious` against its twin, the official codes, and its flat banks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile.optim import Transform, chain, scale_by_adam, scale_by_learning_rate
from fusion_compile.optim._parameter_sums import WIDTH
from fusion_compile.optim._transform import bound, stateless
from fusion_compile.optim.add_cautious_weight_decay import add_cautious_weight_decay
from fusion_compile.optim.cautious import RESCALES, cautious
from fusion_compile.optim.scale_by_lion import scale_by_lion
from tests.data.bowl import SHAPES, UPDATES, trace
from tests.data.official_cautious import CASES, Case
from tests.optim.cautious_walk import descent, over_mona
from tests.optim.walks import (
    Walk,
    a_bank_moves_as_its_members,
    distance,
    flat_bank,
    keeps_the_laws,
    nodes,
    numbers,
    to_torch,
)
from tests.oracles.cautious import Rescale
from tests.oracles.protocol import float64_copies
from tests.problems import BowlGradient


def fixed(direction: Tensor) -> Transform:
    """A base that always gives this direction."""
    return stateless(lambda updates, params, context: {k: direction.clone() for k in updates}, {}, "fixed")


@pytest.mark.parametrize("rescale", RESCALES)
def test_cautious_follows_its_twin(rescale: Rescale) -> None:
    assert distance(descent(rescale), over_mona(rescale), torch.float64, tuple(SHAPES)) <= 1e-9


@pytest.mark.parametrize("rescale", ["mean", "norm"])
def test_fp32_follows_the_float64_twin(rescale: Rescale) -> None:
    """As MONA alone, 6e-5 at most; one sign that rounds the other way moves the factor of the smallest tensor (33
    entries) by 3 % of a step, 3e-4 of 100. Measured: 4e-7, no sign did."""
    assert distance(descent(rescale), over_mona(rescale), torch.float32, tuple(SHAPES)) <= 6e-5


def c_adamw_loop() -> Transform:
    # Its eps is added to √v before the bias correction: as a schedule, eps / √(1 - β₂ᵗ) says the same behind it.
    adam = scale_by_adam((0.9, 0.999), eps=lambda step: 1e-6 / math.sqrt(1 - 0.999 ** (step + 1)))
    return chain(cautious(adam), scale_by_learning_rate(1e-3))


def c_lion(rescale: str = "count_plus_one") -> Transform:
    return chain(cautious(scale_by_lion((0.95, 0.98)), rescale=rescale), scale_by_learning_rate(1e-4))


OFFICIAL = {"c_adamw_loop": c_adamw_loop, "c_lion": c_lion}


def ratios(name: str, transform: Transform, *, flat: bool, updates: tuple[int, ...] = UPDATES) -> list[float]:
    """Error over bound of every tensor after `updates`, in fp32; the six tensors by name, or in one flat bank."""
    case, gradient = Case(name), BowlGradient()
    params = to_torch(gradient.start, torch.float32)
    banks, facts, back = flat_bank(params)
    walk = Walk(bound(transform, {"scalar/flat": facts}), banks) if flat else Walk(transform, params)
    found: list[float] = []
    for update in range(1, max(updates) + 1):
        weights = back(walk.params["scalar/flat"]) if flat else walk.params
        grads = to_torch(gradient(float64_copies(weights), update), torch.float32)
        live = {n: v(update - 1) for n, v in transform.hyperparameters.items() if callable(v)}
        walk(flat_bank(grads)[0] if flat else grads, **live)
        if update in updates:
            weights = back(walk.params["scalar/flat"]) if flat else walk.params
            found += case.ratios(update, trace(weights, gradient.start)).values()
    return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_cautious_follows_the_official_trajectory(name: str, flat: bool) -> None:
    found = ratios(name, OFFICIAL[name](), flat=flat)
    assert len(found) == len(UPDATES) * len(SHAPES) and max(found) <= 1, max(found)


def test_the_bound_sees_the_other_rescaling_and_a_flat_bank_taken_for_one_parameter() -> None:
    assert max(ratios("c_lion", c_lion("mean"), flat=False, updates=(20,))) > 1
    whole = c_adamw_loop().with_extras(bind=None)
    assert max(ratios("c_adamw_loop", whole, flat=True, updates=(20,))) > 1


@pytest.mark.parametrize("rescale", RESCALES)
def test_a_flat_bank_moves_as_its_parameters(rescale: str) -> None:
    torch.manual_seed(0)
    named = {"a": torch.randn(5), "b": torch.randn(3, 7), "long": torch.randn(3 * WIDTH + 1), "c": torch.randn(1)}
    named = {n: p.double() for n, p in named.items()}
    transform = descent(rescale)
    banks, facts, back = flat_bank(named)
    walk = Walk(bound(transform, {"scalar/flat": facts}), banks)
    alone = Walk(transform, {n: p.reshape(-1) for n, p in named.items()})
    for _ in range(5):
        grads = {n: torch.randn_like(p) for n, p in named.items()}
        walk(flat_bank(grads)[0])
        alone({n: g.reshape(-1) for n, g in grads.items()})
    for n, p in back(walk.params["scalar/flat"]).items():
        torch.testing.assert_close(p.reshape(-1), alone.params[n], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(walk.state[0].keep_frac, alone.state[0].keep_frac, rtol=1e-12, atol=0)


def test_the_tables_are_no_state_and_survive_tracing() -> None:
    banks, facts, _ = flat_bank({"a": torch.randn(5), "b": torch.randn(9)})
    transform = bound(descent(), {"scalar/flat": facts})
    walk = Walk(transform, banks)
    assert list(walk.state[0]._fields) == ["base", "keep_frac"]
    nodes(transform, banks)  # init and update on meta tensors
    walk({"scalar/flat": torch.randn_like(banks["scalar/flat"])})
    compiled = torch.compile(transform.update, backend="aot_eager", fullgraph=True)
    grads = {"scalar/flat": torch.randn_like(banks["scalar/flat"])}
    context = numbers(transform, torch.float32)
    wanted, _ = transform.update(grads, walk.state, walk.params, context)
    found, _ = compiled(grads, walk.state, walk.params, context)
    torch.testing.assert_close(found["scalar/flat"], wanted["scalar/flat"])


@pytest.mark.parametrize(
    ("rescale", "floor", "at_most"),
    [("mean", 1e-3, 1000.0), ("mean", 0.1, 10.0), ("norm", 1e-3, 64.0), ("none", 1e-3, 1.0)],
)
def test_one_agreeing_entry_among_4096_moves_no_thousands_of_lr(rescale: str, floor: float, at_most: float) -> None:
    """1 / mean(mask) alone would be 4,096; the norm of 4,096 ones is 64."""
    u, g = torch.ones(64, 64), -torch.ones(64, 64)
    g[3, 4] = 1.0
    walk = Walk(cautious(fixed(u), floor=floor, rescale=rescale), {"w": torch.zeros(64, 64)})
    out = walk({"w": g})["w"]
    assert float(out[3, 4]) == pytest.approx(at_most, rel=1e-6)
    assert int(out.count_nonzero()) == 1 and float(walk.state.keep_frac) == 1 / 4096


@pytest.mark.parametrize("rescale", RESCALES)
def test_all_agree_and_none_agrees(rescale: str) -> None:
    u = torch.randn(2, 8, 8, dtype=torch.float64)
    walk = Walk(cautious(fixed(u), rescale=rescale), {"w": torch.zeros_like(u)})
    factor = 64 / 65 if rescale == "count_plus_one" else 1.0
    torch.testing.assert_close(walk({"w": u})["w"], factor * u, rtol=1e-7, atol=0)  # 1e-8 beside a norm of 8
    assert walk.transform.diagnostics is not None
    assert float(walk.transform.diagnostics(walk.state)["comp/cautious_keep_frac"]) == 1
    assert not walk({"w": -u})["w"].any() and float(walk.state.keep_frac) == 0


def test_the_norm_is_kept_matrix_by_matrix_and_only_disagreeing_entries_stop() -> None:
    u, g = torch.randn(2, 4, 32, 16, dtype=torch.float64).unbind()
    out = Walk(cautious(fixed(u), rescale="norm"), {"w": torch.zeros_like(u)})({"w": g})["w"]
    torch.testing.assert_close(out.norm(dim=(-2, -1)), u.norm(dim=(-2, -1)), rtol=1e-8, atol=0)
    assert torch.equal(out != 0, u * g > 0)


def test_gradients_too_small_to_multiply_still_have_signs() -> None:
    u = torch.full((4, 4), 1e-30)
    assert not (u * u).any()  # what comparing products would see
    assert torch.equal(Walk(cautious(fixed(u)), {"w": torch.zeros(4, 4)})({"w": u})["w"], u)
    w = torch.full((4, 4), -1e-30)
    assert torch.equal(Walk(add_cautious_weight_decay(0.5), {"w": w})({"w": u})["w"], u)  # disagrees: no decay


@pytest.mark.parametrize("rescale", RESCALES)
def test_laws(rescale: str) -> None:
    for dtype in (torch.float32, torch.float64):
        banks, facts, _ = flat_bank({"a": torch.randn(5, dtype=dtype), "b": torch.randn(3, 7, dtype=dtype)})
        transform = bound(descent(rescale, 0.1), {"scalar/flat": facts})
        keeps_the_laws(transform, banks | {"spectral/a": torch.randn(3, 8, 5, dtype=dtype)})
    a_bank_moves_as_its_members(lambda: descent(rescale))


def test_the_graph_does_not_grow_with_depth() -> None:
    assert nodes(descent(), {"w": torch.empty(4, 8, 5)}) == nodes(descent(), {"w": torch.empty(28, 8, 5)})

    def flat(depth: int) -> int:
        banks, facts, _ = flat_bank({f"blocks.{i}.{n}": torch.empty(n) for i in range(depth) for n in (8, 33)})
        return nodes(bound(descent(), {"scalar/flat": facts}), banks)

    assert flat(4) == flat(28)


def test_what_the_base_has_is_passed_on() -> None:
    inner = cautious(scale_by_adam())
    assert dict(inner.hyperparameters) == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    outer = cautious(chain(inner, name="inner"), rescale="none")
    state = outer.init({"w": torch.ones(2)})
    assert outer.diagnostics is not None and list(outer.diagnostics(state)) == ["comp/cautious_keep_frac"]
    assert cautious(optim.orthogonalize()).roles == ("spectral",)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: cautious(scale_by_adam(), rescale="rms"), "rescale='rms' is not known; use one of 'mean', 'norm'"),
        (lambda: cautious(scale_by_adam(), floor=0.0), r"floor=0\.0 must lie in \(0, 1\]"),
        (lambda: cautious(optim.sf_adamw()), r"schedule_free\(adamw\) moves the gradient point"),
    ],
)
def test_refusals(build: Callable[[], Transform], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_a_base_that_takes_the_step_is_refused_because_nothing_would_move() -> None:
    with pytest.raises(ValueError, match=r"adamw takes a step.*hold all entries still.*chain\(cautious\(scale_by_adam"):
        cautious(optim.adamw())
