"""Losses of which something is changed between two calls."""

from __future__ import annotations

import argparse
import contextvars
import functools
import os
import threading
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.changed_program import Program, around, of_loss, plain_loss, program

SETTINGS = types.SimpleNamespace(weight=1.0, loss=types.SimpleNamespace(weight=1.0), unread=0)
OPTIONS: dict[str, Any] = {"weight": 1.0, "deep": {"weight": [1.0, 2.0]}}
SCALE = 1.0
TEACHERS = {"a": nn.Linear(4, 2)}
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)


class Constants:
    WEIGHT = 1.0


def helper(x: Tensor) -> Tensor:
    return x * 2


@program
def namespace_in_a_closure() -> Program:
    arguments = argparse.Namespace(weight=1.0)
    return of_loss(lambda out: arguments.weight, lambda: setattr(arguments, "weight", 2.0), "arguments.weight")


@program
def namespace_read_by_computed_names() -> Program:
    given = types.SimpleNamespace(a0=1.0, a1=1.0)
    return of_loss(
        lambda out: sum(getattr(given, f"a{i}") for i in range(2)), lambda: setattr(given, "a1", 2.0), "given.a1"
    )


@program
def namespace_read_as_a_dictionary() -> Program:
    given = types.SimpleNamespace(a=1.0)
    return of_loss(lambda out: sum(vars(given).values()), lambda: setattr(given, "b", 2.0), "given.b")


@program
def number_in_a_closure() -> Program:
    weight = 1.0

    def change() -> None:
        nonlocal weight
        weight = 2.0

    return of_loss(lambda out: weight, change, "weight")


@program
def list_in_a_closure() -> Program:
    weights = [1.0, 1.0]
    return of_loss(lambda out: torch.tensor(weights).sum(), lambda: weights.__setitem__(0, 2.0), "weights[0]")


@program
def global_number() -> Program:
    return of_loss(lambda out: SCALE, lambda: globals().update(SCALE=SCALE + 1), "SCALE")


@program
def global_namespace() -> Program:
    change = lambda: setattr(SETTINGS, "weight", SETTINGS.weight + 1)  # noqa: E731
    return of_loss(lambda out: SETTINGS.weight, change, "SETTINGS.weight")


@program
def global_namespace_in_a_namespace() -> Program:
    change = lambda: setattr(SETTINGS.loss, "weight", SETTINGS.loss.weight + 1)  # noqa: E731
    return of_loss(lambda out: SETTINGS.loss.weight, change, "SETTINGS.loss.weight")


@program
def global_dictionary() -> Program:
    change = lambda: OPTIONS.update(weight=OPTIONS["weight"] + 1)  # noqa: E731
    return of_loss(lambda out: OPTIONS["weight"], change, "OPTIONS['weight']")


@program
def global_dictionary_in_a_dictionary() -> Program:
    change = lambda: OPTIONS["deep"]["weight"].reverse()  # noqa: E731
    return of_loss(lambda out: OPTIONS["deep"]["weight"][1], change, "OPTIONS['deep']['weight'][0]")


@program
def key_that_is_new() -> Program:
    given: dict[str, float] = {}
    return of_loss(lambda out: given.get("weight", 1.0), lambda: given.update(weight=2.0), "given['weight']")


@program
def class_as_a_namespace() -> Program:
    change = lambda: setattr(Constants, "WEIGHT", Constants.WEIGHT + 1)  # noqa: E731
    return of_loss(lambda out: Constants.WEIGHT, change, "Constants.WEIGHT")


@program
def global_function_replaced() -> Program:
    before = helper
    change = lambda: globals().update(helper=lambda x: before(x))  # noqa: E731
    return of_loss(lambda out: helper(out).mean(), change, "helper")


@program
def teacher_in_a_dictionary_replaced() -> Program:
    change = lambda: TEACHERS.update(a=nn.Linear(4, 2))  # noqa: E731
    loss = lambda model, x, y: F.mse_loss(model(x), TEACHERS["a"](x))  # noqa: E731
    return Program(loss, change, "TEACHERS['a']", around(nn.Tanh()))


@program
def teacher_switched_to_training() -> Program:
    teacher = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)).eval()
    loss = lambda model, x, y: F.mse_loss(model(x), teacher(x))  # noqa: E731
    return Program(loss, lambda: teacher.train(), "teacher.1.training", around(nn.Tanh()))


@program
def teacher_loaded_with_new_tensors() -> Program:
    teacher = nn.Linear(4, 2)
    other = nn.Linear(4, 2).state_dict()
    loss = lambda model, x, y: F.mse_loss(model(x), teacher(x))  # noqa: E731
    return Program(loss, lambda: teacher.load_state_dict(other, assign=True), "teacher.weight", around(nn.Tanh()))


@program
def tensor_in_a_closure_replaced() -> Program:
    given = {"weight": torch.ones(2)}
    return of_loss(lambda out: given["weight"].sum(), lambda: given.update(weight=torch.ones(2)), "given['weight']")


@program
def attribute_of_a_trainer() -> Program:
    class Trainer:
        weight = 1.0

        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return plain_loss(model, x, y) * self.weight

    trainer = Trainer()
    return Program(trainer.loss, lambda: setattr(trainer, "weight", 2.0), "loss.weight", around(nn.Tanh()))


@program
def attribute_of_a_callable_object() -> Program:
    class Loss:
        def __init__(self) -> None:
            self.weight = 1.0

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return plain_loss(model, x, y) * self.weight

    loss = Loss()
    return Program(loss, lambda: setattr(loss, "weight", 2.0), "loss.weight", around(nn.Tanh()))


@program
def label_smoothing_of_a_criterion() -> Program:
    criterion = nn.CrossEntropyLoss()
    loss = lambda model, x, y: criterion(model(x), y.softmax(1))  # noqa: E731
    change = lambda: setattr(criterion, "label_smoothing", 0.1)  # noqa: E731
    return Program(loss, change, "criterion.label_smoothing", around(nn.Tanh()))


@program
def default_argument_replaced() -> Program:
    def loss(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
        return plain_loss(model, x, y) * weight

    return Program(loss, lambda: setattr(loss, "__defaults__", (2.0,)), "loss.__defaults__", around(nn.Tanh()))


@program
def dictionary_as_a_default_argument() -> Program:
    weights = {"a": 1.0}

    def loss(model: nn.Module, x: Tensor, y: Tensor, weights: Any = weights) -> Tensor:
        return plain_loss(model, x, y) * weights["a"]

    return Program(loss, lambda: weights.update(a=2.0), "loss's default weights['a']", around(nn.Tanh()))


@program
def keyword_only_default() -> Program:
    def loss(model: nn.Module, x: Tensor, y: Tensor, *, weight: float = 1.0) -> Tensor:
        return plain_loss(model, x, y) * weight

    def change() -> None:
        assert loss.__kwdefaults__ is not None
        loss.__kwdefaults__.update(weight=2.0)

    return Program(loss, change, "loss's defaults['weight']", around(nn.Tanh()))


@program
def partials_argument() -> Program:
    def loss(weights: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(model, x, y) * weights["a"]

    weights = {"a": 1.0}
    return Program(
        functools.partial(loss, weights), lambda: weights.update(a=2.0), "loss.args[0]['a']", around(nn.Tanh())
    )


@program
def function_attribute() -> Program:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(model, x, y) * loss.weight  # type: ignore[attr-defined]

    loss.weight = 1.0  # type: ignore[attr-defined]
    return Program(loss, lambda: setattr(loss, "weight", 2.0), "loss.weight", around(nn.Tanh()))


@program
def code_replaced() -> Program:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(model, x, y)

    def other(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return plain_loss(model, x, y) * 2

    change = lambda: setattr(loss, "__code__", other.__code__)  # noqa: E731
    return Program(loss, change, "loss.__code__", around(nn.Tanh()))


@program
def thread_local_value() -> Program:
    local = threading.local()
    local.weight = 1.0
    return of_loss(lambda out: local.weight, lambda: setattr(local, "weight", 2.0), "local.weight")


@program
def context_variable() -> Program:
    return of_loss(lambda out: CONTEXT.get(), lambda: CONTEXT.set(CONTEXT.get() + 1), "CONTEXT")


@program
def environment() -> Program:
    os.environ["FUSION_COMPILE_TEST_WEIGHT"] = "1"
    change = lambda: os.environ.update(FUSION_COMPILE_TEST_WEIGHT="2")  # noqa: E731
    label = "os.environ['FUSION_COMPILE_TEST_WEIGHT']"
    return of_loss(lambda out: float(os.environ.get("FUSION_COMPILE_TEST_WEIGHT", "1")), change, label)


@program
def long_list() -> Program:
    data = list(range(2000))
    return of_loss(lambda out: len(data), lambda: data.append(0), "len(data)")
