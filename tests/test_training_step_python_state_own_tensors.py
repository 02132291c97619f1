"""The model's own tensors kept by a forward, a teacher that follows the model, and state in tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.python_state import Layer, Training, around, layered, ordinary, through_a_step
from tests.small_models import PROGRAMS, compiled, mlp, squared_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:the step is captured by running it"),
    pytest.mark.filterwarnings("ignore:this step ran uncaptured"),
]

Make = Callable[[], Training]
EQUAL: dict[str, Make] = {}
OWN: dict[str, Make] = {}


def equal(make: Make) -> Make:
    EQUAL[make.__name__] = make
    return make


def own(make: Make) -> Make:
    """`look` gives tensors that are the model's own, in the order of its parameters and buffers."""
    OWN[make.__name__] = make
    return equal(make)


@own
def a_list_of_parameters_made_by_each_forward() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.all = list(self.inner.parameters())
        return self.inner(x) * self.all[0].norm()

    layer = Layer(run, inner=nn.Linear(8, 8))
    return Training(around(layer), look=lambda: layer.all)


@own
def a_list_of_parameters_made_by_the_first_forward() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if self.all is None:
            self.all = list(self.inner.parameters())
        return self.inner(x) + self.all[1]

    layer = Layer(run, inner=nn.Linear(8, 8), all=None)
    return Training(around(layer), look=lambda: layer.all)


@own
def parameters_in_a_dictionary_of_a_closure() -> Training:
    held: dict[str, Any] = {}
    model = mlp()

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        held["weight"], held["both"] = model[0].weight, (model[0].bias, model[2].weight)
        return value + 1e-3 * held["weight"].square().sum() + held["both"][0].sum()

    return Training(model, loss, look=lambda: [held["weight"], *held["both"]])


@own
def a_parameter_in_an_attribute_of_another_object() -> Training:
    trainer = types.SimpleNamespace()

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        trainer.weight = model[0].weight
        return squared_error(model, x, y)

    return Training(mlp(), loss, look=lambda: [trainer.weight])


@own
def a_buffer_in_an_attribute() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        out = x + self.norm(x).detach()  # detached: before a norm the gradient of a bias is zero up to rounding
        self.mean = self.norm.running_mean
        return out + self.mean

    layer = Layer(run, norm=nn.BatchNorm1d(8, affine=False))
    return Training(around(layer), look=lambda: [layer.mean])


@equal
def parameters_beside_other_tensors() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.kept = {"w": self.inner.weight, "mean": x.detach().mean(0)}
        return self.inner(x) * self.kept["w"].mean()

    layer = Layer(run, inner=nn.Linear(8, 8), kept={"w": None, "mean": torch.zeros(8)})
    return Training(around(layer), look=lambda: layer.kept)


def following(update: Callable[[Any, Any], None], *, in_tuples: bool = False) -> Training:
    """A momentum encoder that `update` moves at each forward."""
    model = mlp()
    teacher = copy.deepcopy(model).requires_grad_(False)
    pairs = tuple(zip(model.parameters(), teacher.parameters(), strict=True))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for q, k in pairs if in_tuples else zip(model.parameters(), teacher.parameters(), strict=True):
            update(q, k)
        with torch.no_grad():
            target = teacher(x)
        return squared_error(model, x, y) + F.mse_loss(model(x), target)

    return Training(model, loss, look=lambda: [p.data for p in teacher.parameters()])


def _put(q: Any, k: Any) -> None:
    k.data = k.data * 0.9 + q.data * 0.1


def _put_with_a_view(q: Any, k: Any) -> None:
    before = k.data
    k.data = before * 0.9 + q.detach() * 0.1
    k.data.add_(k.data - before)


@equal
def a_teacher_whose_data_is_replaced() -> Training:
    return following(_put)


@equal
def a_teacher_whose_data_is_replaced_beside_the_old() -> Training:
    return following(_put_with_a_view)


@equal
def a_teacher_whose_data_is_scaled_and_added_to() -> Training:
    return following(lambda q, k: k.data.mul_(0.9).add_(q.data, alpha=0.1))


@equal
def a_teacher_in_tuples() -> Training:
    return following(_put, in_tuples=True)


@equal
def a_teacher_in_tuples_written_in_place() -> Training:
    return following(lambda q, k: k.data.mul_(0.9).add_(q.data, alpha=0.1), in_tuples=True)


@equal
def a_teacher_inside_of_the_model() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            k.data = k.data * 0.9 + q.data * 0.1
        return self.student(x) - self.teacher(x).detach()

    layer = Layer(run, student=nn.Linear(8, 8), teacher=nn.Linear(8, 8).requires_grad_(False))
    return Training(around(layer))


class Moments(NamedTuple):
    mean: Tensor
    square: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    mean: Tensor
    rate: float = 0.1


@equal
def moments_in_a_named_tuple() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.state = self.state._replace(mean=self.state.mean.lerp(x.detach().mean(0), 0.1))
        return (x - self.state.mean) / self.state.square

    return layered(run, "state", state=Moments(torch.zeros(8), torch.ones(8)))


@equal
def a_frozen_dataclass() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        kept = self.kept
        self.kept = dataclasses.replace(kept, mean=kept.mean.lerp(x.detach().mean(0), kept.rate))
        return x - self.kept.mean

    training = layered(run, kept=Frozen(torch.zeros(8)))
    layer: Any = training.model.get_submodule("1")
    training.look = lambda: layer.kept.mean
    return training


class Counted(NamedTuple):
    mean: Tensor
    seen: int


@equal
def a_count_beside_a_mean() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        mean, seen = self.state
        self.state = Counted(mean.lerp(x.detach().mean(0), 0.1), seen + 1)
        return x - self.state.mean / (1 - 0.9**self.state.seen)

    training = layered(run, "state", state=Counted(torch.zeros(8), 0))
    training.accumulate = 2
    return training


@equal
def plain_numbers_in_a_tuple() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.state = (self.state[0] + 1, self.state[1] * 0.9)
        return x * self.state[1] + (0.5 if self.state[0] > 3 else 0.0)

    return layered(run, "state", state=(0, 1.0))


@equal
def a_partial_with_a_state() -> Training:
    def loss(total: Tensor, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        total.add_(value.detach())
        return value / total

    total = torch.ones(())
    return Training(mlp(), functools.partial(loss, total), look=lambda: total)


@equal
def a_partial_that_is_replaced() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        out = self.around(x)
        self.around = functools.partial(torch.add, x.detach().mean(0), alpha=0.5)
        return out

    training = layered(run, around=functools.partial(torch.add, torch.zeros(8), alpha=0.5))
    layer: Any = training.model.get_submodule("1")
    training.look = lambda: layer.around.args[0]
    return training


@equal
def statistics_written_in_place_in_a_tuple() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.state[0].lerp_(x.detach().mean(0), 0.1)
        return x - self.state[0]

    return layered(run, "state", state=(torch.zeros(8), torch.ones(8)))


SELDOM = {
    "a_parameter_in_an_attribute_of_another_object",
    "a_teacher_whose_data_is_replaced",
    "a_teacher_whose_data_is_scaled_and_added_to",
    "a_teacher_in_tuples",
    "moments_in_a_named_tuple",
    "a_partial_with_a_state",
    "a_partial_that_is_replaced",
    "plain_numbers_in_a_tuple",
    "a_count_beside_a_mean",
}
"""Programs beside which another one shows nearly the same."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in SELDOM else []) for name in EQUAL]
)
def test_it_is_the_ordinary_loop(name: str, program: dict[str, Any]) -> None:
    """Two runs add in another order, so float32 rounding is allowed for: assert_close's 1.3e-6 and 1e-5."""
    expected_training, expected = ordinary(EQUAL[name])
    training, seen = through_a_step(EQUAL[name], **program)
    assert_close(seen, expected)
    assert_close(dict(training.model.state_dict()), dict(expected_training.model.state_dict()))


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PROGRAMS[request.param]


@pytest.mark.parametrize("name", OWN)
def test_what_is_kept_is_the_models_own(name: str, program: dict[str, Any]) -> None:
    training = OWN[name]()
    step = compiled(training.model, training.loss, **program)
    theirs = {id(t) for t in (*training.model.parameters(), *training.model.buffers())}
    for batch in training.data[:2]:
        step(*batch)
        assert {id(tensor) for tensor in training.look()} <= theirs


@pytest.mark.parametrize("way", PROGRAMS)
def test_a_count_in_a_tuple_has_one_program_and_is_in_the_checkpoint(way: str) -> None:
    expected_training, expected = ordinary(a_count_beside_a_mean)
    saved: Any = None
    for part in (slice(3), slice(3, None)):
        torch.manual_seed(0)
        training = a_count_beside_a_mean()
        step = compiled(training.model, training.loss, accumulate=2, **PROGRAMS[way])
        if saved is not None:
            step.load_state_dict(saved)
        seen = [[step(*batch), [*training.look()[0]]] for batch in training.data[part]]
        assert_close(seen, expected_of(expected[part]))
        assert len(step.programs) == (way == "captured")
        saved = step.state_dict()
    assert saved["numbers"] == {"model.1.state[1]": 10}
    assert_close(dict(training.model.state_dict()), dict(expected_training.model.state_dict()))


def expected_of(seen: list[Any]) -> list[Any]:
    return [[loss, [*look[0]]] for loss, look in seen]
