"""Measuring a part changes nothing and tells its gain or its norm."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import Named, chain, orthogonalize, scale_by_adam, scale_by_learning_rate
from fusion_compile.optim._transform import BankInfo, Extras, Periodic, Place, Transform
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.measured import measured
from tests.optim.walks import Walk, keeps_the_laws, nodes, numbers

BANKS = {"spectral/a": torch.randn(3, 8, 5, dtype=torch.float64), "scalar/b": torch.randn(7, dtype=torch.float64)}


def told(walk: Walk) -> dict[str, float]:
    assert walk.transform.diagnostics is not None
    return {name: float(t) for name, t in walk.transform.diagnostics(walk.state).items()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.reshape(-1) for t in tensors.values()]).norm())


def test_the_updates_are_the_bases_bit_for_bit() -> None:
    walk, plain = Walk(measured(scale_by_adam(), "x"), BANKS), Walk(scale_by_adam(), BANKS)
    for _ in range(3):
        g = {k: torch.randn_like(p) for k, p in BANKS.items()}
        found, wanted = walk(g), plain(g)
        assert all(torch.equal(found[k], u) for k, u in wanted.items())


def test_gain_and_norm_run_over_all_banks() -> None:
    g = {k: torch.randn_like(p) for k, p in BANKS.items()}
    walk = Walk(measured(measured(scale_by_adam(), "comp/norm", "norm"), "comp/gain"), BANKS)
    out = norm(walk(g))
    assert told(walk) == pytest.approx({"comp/norm": out, "comp/gain": out / norm(g)}, rel=1e-12)
    scaled = Walk(measured(scale_by_learning_rate(0.25), "g"), BANKS)
    scaled(g)
    assert told(scaled) == pytest.approx({"g": 0.25}, rel=1e-12)


def test_a_gain_over_nothing_is_zero() -> None:
    walk = Walk(measured(scale_by_adam(), "g"), BANKS)
    assert told(walk) == {"g": 0.0}
    walk({k: torch.zeros_like(p) for k, p in BANKS.items()})
    assert told(walk) == {"g": 0.0}


def test_schedule_free_keeps_its_gradient_point() -> None:
    transform = measured(optim.sf_adamw(), "g")
    walk = Walk(transform, BANKS)
    for _ in range(2):
        walk({k: torch.randn_like(p) for k, p in BANKS.items()})
    plain = optim.sf_adamw().gradient_point
    assert transform.gradient_point is not None and plain is not None
    found = transform.gradient_point(walk.params, walk.state, numbers(transform))
    wanted = plain(walk.params, walk.state.base, numbers(transform))
    assert all(torch.equal(found[k], y) and not torch.equal(y, walk.params[k]) for k, y in wanted.items())


def test_what_the_base_has_is_passed_on() -> None:
    inner = chain(cautious(scale_by_adam((Named("b", 0.8), 0.999))), name="inner")
    passed = measured(inner, "g")
    assert passed.hyperparameters == inner.hyperparameters and passed.name == "inner"
    assert measured(orthogonalize(), "g").roles == ("spectral",) and measured(scale_by_adam(), "g").bind is None
    assert passed.bind is not None
    facts = {"scalar/b": BankInfo((Place("one", (3,), 0), Place("two", (3,), 4)))}
    banks = {"scalar/b": torch.ones(8)}
    walks = [Walk(t, banks) for t in (passed.bind(facts), inner.bind(facts), inner)]  # type: ignore[misc]
    g = {"scalar/b": torch.tensor([1.0, 1, 1, 0, 1, 1, -1, 0])}
    for walk in walks:
        walk({"scalar/b": torch.ones(8)})
    found = [walk(g)["scalar/b"] for walk in walks]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert set(told(walks[0])) == {"g", "comp/cautious_keep_frac"}


def test_periodic_work_reaches_the_base() -> None:
    def refresh(state: torch.Tensor, params: object, context: object) -> torch.Tensor:
        return state + 1

    base = Transform(
        lambda params: torch.zeros(()),
        lambda u, s, p, c: (u, s.clone()),
        Extras(periodic=(Periodic("r", 4, refresh),), period=4),
    )
    wrapped = measured(base, "g")
    (work,) = wrapped.periodic
    state = work.update(wrapped.init(BANKS), BANKS, numbers(wrapped))
    assert (work.every, wrapped.period, float(state.base), float(state.value)) == (4, 4, 1.0, 0.0)


def test_laws() -> None:
    for dtype in (torch.float32, torch.float64):
        for what in ("gain", "norm"):
            keeps_the_laws(measured(scale_by_adam(), "g", what), {k: b.to(dtype) for k, b in BANKS.items()})
    transform = measured(scale_by_adam(), "g")
    assert nodes(transform, {"w": torch.empty(4, 8, 5)}) == nodes(transform, {"w": torch.empty(28, 8, 5)})


def test_an_unknown_quantity_lists_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="what='ratio' is not known; use one of 'gain', 'norm'"):
        measured(scale_by_adam(), "g", "ratio")
