"""`Transform` and its extras: defaults, replacing, names of numbers, places."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import Extras, Named, Periodic, Place, Transform
from fusion_compile.optim._transform import bound, by_name, declare, merge_hyperparameters, stateless


def bare() -> Transform:
    return Transform(lambda params: optim.EmptyState(), lambda updates, state, params, context: (updates, state))


def test_two_functions_are_a_transform_and_everything_else_has_a_default() -> None:
    transform = bare()
    assert transform.extras == Extras() and transform.name == "transform" and dict(transform.hyperparameters) == {}
    assert transform.roles == () and transform.periodic == () and transform.period == 0 and not transform.descends
    assert transform.gradient_point is None and transform.diagnostics is None and transform.bind is None


def test_replacing_extras_leaves_the_transform_and_the_other_extras_alone() -> None:
    before = bare()
    after = before.with_extras(name="mine", period=3)
    assert (after.name, after.period, after.roles) == ("mine", 3, ())
    assert (before.name, before.period) == ("transform", 0) and after.update is before.update
    with pytest.raises(ValueError, match="colour"):
        before.with_extras(colour="red")


def test_binding_is_asked_for_or_not() -> None:
    other = bare().with_extras(name="bound")
    asks = bare().with_extras(bind=lambda infos: other.with_extras(roles=tuple(infos)))
    assert bound(asks, {"w": optim.BankInfo(())}).roles == ("w",)
    plain = bare()
    assert bound(plain, {}) is plain


def test_a_number_has_a_default_name_or_its_own() -> None:
    assert declare("lr", 0.1) == Named("lr", 0.1)
    assert declare("lr", Named("head_lr", 0.2)) == Named("head_lr", 0.2)
    assert by_name(Named("a", 1.0), Named("b", 2.0)) == {"a": 1.0, "b": 2.0}


def test_one_name_with_two_values_is_refused_in_one_part_too() -> None:
    with pytest.raises(ValueError, match=r"'beta' is declared twice with different values \(0\.9 and 0\.99\)"):
        optim.scale_by_adam((Named("beta", 0.9), Named("beta", 0.99)))
    assert merge_hyperparameters({"lr": 0.1}, {"lr": 0.1, "eps": 1e-8}) == {"lr": 0.1, "eps": 1e-8}


def test_a_stateless_transform_keeps_nothing() -> None:
    double = stateless(lambda updates, params, context: {k: 2 * u for k, u in updates.items()}, {"x": 1.0}, "double")
    grads = {"w": torch.ones(2)}
    updates, state = double.update(grads, double.init(grads), grads, optim.Context({}))
    assert updates["w"].tolist() == [2.0, 2.0] and state == optim.EmptyState()
    assert (double.name, dict(double.hyperparameters), double.descends) == ("double", {"x": 1.0}, False)


def test_periodic_work_is_due_after_the_first_step_and_every_so_many_from_there() -> None:
    work = Periodic("w", 3, lambda state, params, context: state)
    assert [steps for steps in range(1, 11) if work.is_due(steps)] == [1, 4, 7, 10]


def test_a_place_knows_its_number_of_entries() -> None:
    assert Place("w", (3, 4), 0).numel == 12 and Place("number", (), 5).numel == 1


def test_betas_are_a_pair() -> None:
    for make in (optim.scale_by_adam, optim.scale_by_lion, optim.scale_by_soap, optim.scale_by_kl_soap):
        for betas in (0.9, Named("beta", 0.9), (0.9,)):
            with pytest.raises(TypeError, match=r"is not a pair; give two numbers, \(0\.9, 0\.999\)"):
                make(betas)  # type: ignore[arg-type]


def test_a_transform_is_its_own_copy_and_refuses_to_be_pickled() -> None:
    adamw = optim.adamw()
    assert copy.copy(adamw) is adamw and copy.deepcopy([adamw])[0] is adamw
    with pytest.raises(TypeError, match=r"^adamw is a Transform, .*functools\.partial\(optim\.adamw"):
        pickle.dumps(adamw)


def test_with_extras_keeps_every_number_that_is_read() -> None:
    adamw = optim.adamw()
    with pytest.raises(ValueError, match=r"with_extras\(hyperparameters=…\) lacks 'beta1', which adamw reads"):
        adamw.with_extras(hyperparameters={"lr": 1.0})
    numbers = {**adamw.hyperparameters, "lr": 1.0, "mine": 2.0}
    assert adamw.with_extras(hyperparameters=numbers).hyperparameters == numbers
