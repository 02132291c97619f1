"""How the extras of a part become those of the whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusion_compile.optim import Context, Extras, Periodic, Transform, measured
from fusion_compile.optim._inner import BASE, BASE_AT_Z, Inner, lift, merge, wrap

CONTEXT = Context({})
ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)


class Outer(NamedTuple):
    base: Any
    z: Any = None


def test_functions_of_a_part_become_functions_of_the_whole() -> None:
    def point(params: Any, state: Tensor, context: Context) -> Any:
        return {k: p + state for k, p in params.items()}

    work = Periodic(
        "w", 2, lambda state, params, context: state + params["w"], lambda state, params, context: 10 * state
    )
    part = Extras("part", gradient_point=point, diagnostics=lambda state: {"d": state}, periodic=(work,))
    lifted = lift(part, BASE_AT_Z)
    state = Outer(ONE, {"w": TWO})
    assert lifted.gradient_point is not None and lifted.diagnostics is not None
    assert float(lifted.gradient_point({"w": ONE}, state, CONTEXT)["w"]) == 3.0  # at z, not at the parameters
    assert float(lifted.diagnostics(state)["d"]) == 1.0
    (again,) = lifted.periodic
    assert again.first is not None and (again.name, again.every) == ("w", 2)
    assert float(again.update(state, {"w": ONE}, CONTEXT).base) == 3.0
    assert float(again.first(state, {"w": ONE}, CONTEXT).base) == 10.0
    assert float(lift(part, BASE).periodic[0].update(state, {"w": ONE}, CONTEXT).base) == 2.0


def test_a_part_without_state_reports_nothing_and_does_nothing() -> None:
    absent = Inner(lambda state: None, lambda state, part: pytest.fail("there is no part to replace"))
    work = Periodic("w", 2, lambda state, params, context: pytest.fail("there is no state to work on"))
    point = lambda params, state, context: pytest.fail("there is no state")  # noqa: E731
    lifted = lift(Extras(gradient_point=point, diagnostics=lambda state: {"d": state}, periodic=(work,)), absent)
    assert lifted.diagnostics is not None and lifted.gradient_point is not None
    assert lifted.diagnostics("state") == {} and lifted.gradient_point({"w": ONE}, "state", CONTEXT) == {"w": ONE}
    assert lifted.periodic[0].update("state", {}, CONTEXT) == "state"


def test_merging_unites_numbers_and_roles_and_the_later_diagnostic_wins() -> None:
    first = Extras("a", {"lr": 0.1}, ("spectral",), diagnostics=lambda s: {"x": 1, "y": 1}, period=4)  # type: ignore[dict-item]
    second = Extras("b", {"eps": 1.0}, ("scalar", "spectral"), diagnostics=lambda s: {"x": 2}, descends=True)  # type: ignore[dict-item]
    whole = merge("whole", [first, second])
    assert (whole.name, whole.hyperparameters) == ("whole", {"lr": 0.1, "eps": 1.0})
    assert (whole.roles, whole.period, whole.descends) == (("spectral", "scalar"), 4, True)
    assert whole.diagnostics is not None and whole.diagnostics(None) == {"x": 2, "y": 1}
    assert merge("nothing", [Extras(), Extras()]).diagnostics is None


def test_two_periods_are_refused() -> None:
    with pytest.raises(ValueError, match="two parts single out every 3 and every 4 steps"):
        merge("whole", [Extras(period=3), Extras(), Extras(period=4)])


def test_a_wrapper_is_rebuilt_around_a_bound_base_only_if_the_base_asks() -> None:
    def identity() -> Transform:
        return Transform(lambda params: ONE, lambda u, s, p, c: (u, s), Extras("identity"))

    known = identity().with_extras(name="known")
    asking = identity().with_extras(bind=lambda infos: known)
    rebuilt = wrap(asking, "w", {}, rebuild=lambda base: measured(base, "d"))
    assert rebuilt.bind is not None and rebuilt.bind({}).name == "known"
    assert wrap(identity(), "w", {}, rebuild=lambda base: measured(base, "d")).bind is None
