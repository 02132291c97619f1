"""The recipe `soap`: its float64 twin, which follows the official trajectory (test_scale_by_soap.py), and its decay."""

from __future__ import annotations

import torch

from fusion_compile import optim
from tests.optim.kronecker_walk import SMALL, Driver, Quadratic, follow, hand_over_bases
from tests.oracles.soap import Soap

MATRICES = {f"spectral/{name}": shape for name, shape in SMALL.items()}
SHAPES: dict[str, tuple[int, ...]] = {**MATRICES, "scalar/rest": (33,)}


def test_it_is_its_twin_for_100_updates() -> None:
    """To the bound of `scale_by_soap` alone. Without decay, which the published code applies after the step."""
    problem = Quadratic(SHAPES, torch.float64)
    driver = Driver(optim.soap(0.01, weight_decay=0.0), problem.start, -1.0)  # the recipe's updates are to be added
    aux = {"lr": 0.01, "betas": (0.95, 0.95), "weight_decay": 0.0}
    oracle = Soap(problem.start, spectral=tuple(MATRICES), lr=0.01, scalar=aux)
    rectangular = ("spectral/tall", "spectral/wide")

    def hand_over() -> None:
        hand_over_bases(driver, oracle, lambda state: state["spectral"][0], rectangular)

    errors = follow(driver, oracle, problem, 100, hand_over)
    assert max(errors.values()) <= 1e-12, errors


def test_the_bound_sees_the_rest_with_another_beta() -> None:
    problem = Quadratic(SHAPES, torch.float64)
    driver = Driver(optim.soap(0.01, weight_decay=0.0), problem.start, -1.0)
    aux = {"lr": 0.01, "betas": (0.95, 0.9500001), "weight_decay": 0.0}
    oracle = Soap(problem.start, spectral=tuple(MATRICES), lr=0.01, scalar=aux)
    assert follow(driver, oracle, problem, 20)["scalar/rest"] > 1e-10


def test_it_is_its_parts_with_one_lr_and_one_decay() -> None:
    matrices = optim.chain(
        optim.scale_by_soap((0.9, 0.95), 0.97, every=3),
        optim.add_decayed_weights(0.1),
        optim.scale_by_learning_rate(2e-3),
    )
    parts = optim.partition({"spectral": matrices, "scalar": optim.adamw(2e-3, (0.9, 0.95), weight_decay=0.1)})
    recipe = optim.soap(2e-3, (0.9, 0.95), 0.97, 0.1, every=3)
    assert recipe.hyperparameters == parts.hyperparameters
    problem = Quadratic(SHAPES, torch.float32)
    drivers = [Driver(transform, problem.start, -1.0) for transform in (recipe, parts)]
    for update in range(1, 9):
        for driver in drivers:
            driver.step(problem.gradient(driver.params, update))
    assert all(torch.equal(p, drivers[1].params[k]) for k, p in drivers[0].params.items())


def test_the_defaults_are_those_of_the_published_code() -> None:
    assert dict(optim.soap().hyperparameters) == {
        **{"beta1": 0.95, "beta2": 0.95, "shampoo_beta": 0.95, "eps": 1e-8},
        **{"weight_decay": 0.01, "lr": 3e-3},
    }
    assert [work.every for work in optim.soap().periodic] == [10]
