"""Shampoo against its float64 twin, whose roots are exact, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile._state.flat_tree import flatten
from fusion_compile.optim import Named, Transform
from fusion_compile.optim._combine import chain
from fusion_compile.optim._transform import BankInfo, Extras, Periodic
from fusion_compile.optim.orthogonalize import orthogonalize
from fusion_compile.optim.scale_by_momentum import scale_by_momentum
from fusion_compile.optim.scale_by_shampoo import scale_by_shampoo
from tests.optim.kronecker_walk import (
    GRADIENTS,
    SMALL,
    Driver,
    Quadratic,
    check_a_bank_moves_as_its_members,
    check_descent,
    check_nodes_and_capture,
    check_odd_gradients,
    check_purity_and_form,
    follow,
)
from tests.optim.tensor_float32 import TensorFloat32
from tests.oracles.shampoo import Shampoo


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("graft", ["none", "norm"])
def test_it_is_its_twin_for_100_updates(graft: Any, dtype: torch.dtype, bound: float) -> None:
    """The first L of tall and R of wide are singular: their roots are known to rounding times the ridge's condition,
    1e4, in the updates 2 to 10 of 100. Measured: 3e-14 and 3e-6."""
    problem = Quadratic(SMALL, dtype)
    driver = Driver(scale_by_shampoo(graft=graft), problem.start, 0.01)
    oracle = Shampoo(problem.start, spectral=tuple(SMALL), lr=0.01, graft=graft)
    errors = follow(driver, oracle, problem, 100)
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("options", [{"shampoo_beta": 0.951}, {"every": 9}, {"ridge": 1.01e-4}, {"beta1": 0.901}])
def test_the_twin_notices_another_number(options: dict[str, Any]) -> None:
    problem = Quadratic(SMALL, torch.float64)
    oracle = Shampoo(problem.start, spectral=tuple(SMALL), lr=0.01, **options)
    assert max(follow(Driver(scale_by_shampoo(), problem.start, 0.01), oracle, problem, 22).values()) > 1e-6


def test_with_memory_of_one_gradient_it_orthogonalizes_it() -> None:
    """L = G Gᵀ and R = Gᵀ G of the gradient itself give U V^T: Shampoo and Muon meet."""
    problem = Quadratic({"w": (8, 8)}, torch.float64)
    g = {"w": torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    driver = Driver(scale_by_shampoo(0.0, 0.0, every=1, ridge=1e-12), problem.start)
    first, second = driver.step(g)["w"], driver.step(g)["w"]
    u, _, vh = torch.linalg.svd(g["w"])
    torch.testing.assert_close(first, g["w"], rtol=0, atol=0)
    # The ridge is 1e-12 of a norm that is 1e4 times the smallest eigenvalue.
    torch.testing.assert_close(second, u @ vh, rtol=0, atol=1e-7)


def test_a_graft_has_the_norm_of_what_came_in_matrix_by_matrix() -> None:
    problem = Quadratic({"w": (3, 6, 10)}, torch.float64)
    base = scale_by_momentum(0.9)
    grafted, alone, bare = (
        Driver(t, problem.start) for t in (scale_by_shampoo(base=base, graft="norm"), base, scale_by_shampoo())
    )
    for u in range(1, 14):
        g = problem.gradient(problem.start, u)
        found, incoming, ungrafted = grafted.step(g)["w"], alone.step(g)["w"], bare.step(g)["w"]
        torch.testing.assert_close(found.flatten(1).norm(dim=1), incoming.flatten(1).norm(dim=1), rtol=1e-13, atol=0)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1), ungrafted.flatten(1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-13)
    tells = bare.transform.diagnostics
    assert tells is not None
    gain = float(ungrafted.norm() / incoming.norm())
    assert float(tells(bare.state)["comp/shampoo_gain"]) == pytest.approx(gain, rel=1e-12)


def test_the_factors_are_built_from_the_gradient_whatever_the_base() -> None:
    problem = Quadratic(SMALL, torch.float64)
    plain, around = (
        Driver(scale_by_shampoo(), problem.start),
        Driver(scale_by_shampoo(base=scale_by_momentum(0.5, nesterov=True)), problem.start),
    )
    for u in range(1, 12):
        for driver in (plain, around):
            driver.step(problem.gradient(problem.start, u))
    for field in ("left", "right", "left_root", "right_root"):
        ours, theirs = getattr(around.state, field), getattr(plain.state, field)
        assert all(torch.equal(t, theirs[k]) for k, t in ours.items())
    assert set(around.transform.hyperparameters) == {"momentum", "shampoo_beta"}
    assert set(plain.transform.hyperparameters) == {"beta1", "shampoo_beta"}


def test_a_base_keeps_its_own_periodic_work_and_learns_its_banks() -> None:
    counting = Transform(
        lambda params: {"n": torch.zeros(())},
        lambda updates, state, params, context: (updates, state),
        Extras("counting", periodic=(Periodic("count", 2, lambda state, params, context: {"n": state["n"] + 1}),)),
    )
    seen: list[Any] = []

    def bind(infos: Any) -> Transform:
        seen.append(infos)
        return counting

    transform = scale_by_shampoo(shampoo_beta=0.7, base=counting.with_extras(bind=bind), every=5)
    assert transform.bind is not None
    known = transform.bind({"w": BankInfo(())})
    assert len(seen) == 1 and known.bind is None and dict(known.hyperparameters) == {"shampoo_beta": 0.7}
    driver = Driver(known, {"w": torch.zeros(3, 4)})
    for _ in range(5):
        driver.step({"w": torch.randn(3, 4)})
    assert float(driver.state.base["n"]) == 3.0 and [w.every for w in known.periodic] == [2, 5]


def test_an_orthogonalization_may_follow() -> None:
    """The chain's result is semi-orthogonal: singular values of Jordan's polynomial lie between 0.68 and 1.2, a
    little wider where the input's spread over more than two decades."""
    problem = Quadratic(SMALL, torch.float32)
    polar = orthogonalize(Named("none", 0.0), nesterov=False, matmul_dtype=torch.float32)
    driver = Driver(chain(scale_by_shampoo(base=scale_by_momentum(0.9)), polar), problem.start, 0.0)
    for u in range(1, 13):
        found = driver.step(problem.gradient(problem.start, u))
    for d in found.values():
        lowest, highest = torch.linalg.svdvals(d).aminmax()
        assert float(lowest) > 0.5 and float(highest) < 1.25


def test_the_scale_of_all_gradients_does_not_matter() -> None:
    """The ridge is relative: gradients of 1e-4 and of 1 are preconditioned alike, to fp32's 1e-2 at condition 1e6."""
    problem = Quadratic(SMALL, torch.float32)
    large, small = Driver(scale_by_shampoo(), problem.start, 0.0), Driver(scale_by_shampoo(), problem.start, 0.0)
    for u in range(1, 25):
        g = problem.gradient(problem.start, u)
        a, b = large.step(g), small.step({k: 1e-4 * t for k, t in g.items()})
    for k, d in a.items():
        assert float((d - b[k]).norm() / d.norm()) < 1e-3, k
        values = torch.linalg.eigvalsh(large.state.left_root[k])
        assert float(values.max() / values.min()) > 1.2, k  # and it is no multiple of I


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"graft": "adam"}, "graft='adam'"),
        ({"ridge": 0.0}, "ridge=0.0"),
        (
            {"base": scale_by_momentum().with_extras(gradient_point=lambda params, state, context: params)},
            "gradient point",
        ),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        scale_by_shampoo(**options)


def test_a_vector_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'b' has shape \(3,\)"):
        scale_by_shampoo().init({"b": torch.zeros(3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [None, scale_by_momentum(0.9)])
def test_nothing_given_is_changed(base: Transform | None, dtype: torch.dtype) -> None:
    check_purity_and_form(scale_by_shampoo(base=base, every=2, graft="norm"), dtype)


def test_a_bank_moves_as_its_members_alone() -> None:
    check_a_bank_moves_as_its_members(scale_by_shampoo, 1e-9)


def test_the_graph_does_not_grow_and_reads_nothing() -> None:
    check_nodes_and_capture(scale_by_shampoo(graft="norm"))


@pytest.mark.parametrize("graft", ["none", "norm"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_odd_gradients_leave_everything_finite(kind: str, graft: str) -> None:
    check_odd_gradients(scale_by_shampoo(graft=graft), kind)


def test_gradients_that_come_late_meet_no_roots_of_zero() -> None:
    """A matrix whose first gradients are zero (behind a zero-initialized layer) keeps the root I until it has some."""
    driver = Driver(scale_by_shampoo(), {"w": torch.zeros(4, 6)})
    for u in range(1, 25):
        found = driver.step({"w": torch.randn(4, 6) if u > 12 else torch.zeros(4, 6)})["w"]
        assert float(found.norm()) < 10
    assert all(bool(torch.isfinite(t).all()) for _, t in flatten(driver.state))


def test_a_root_that_did_not_converge_stays_what_it_was() -> None:
    problem = Quadratic({"w": (12, 32)}, torch.float32)
    driver = Driver(scale_by_shampoo(ridge=1e-7), problem.start, 0.0)
    driver.step(problem.gradient(problem.start, 1))
    before = driver.state
    (work,) = driver.transform.periodic
    singular = before._replace(right={"w": before.right["w"] * 3})
    with TensorFloat32():
        after = work.update(singular, driver.params, driver.context)
    assert torch.equal(after.right_root["w"], before.right_root["w"])
    assert not torch.equal(after.left_root["w"], before.left_root["w"])


@pytest.mark.parametrize("graft", ["none", "norm"])
def test_it_goes_downhill(graft: str) -> None:
    check_descent(scale_by_shampoo(graft=graft), 0.1)
