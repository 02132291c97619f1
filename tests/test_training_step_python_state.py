"""State that user code keeps in Python: each program by kind, equal to the ordinary loop or refused in a sentence."""

from __future__ import annotations

import collections
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.python_state import Training, around, layered, ordinary, through_a_step
from tests.small_models import PROGRAMS, mlp, squared_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:the step is captured by running it"),
    pytest.mark.filterwarnings("ignore:this step ran uncaptured"),
    pytest.mark.filterwarnings("ignore:the loss never reads 0.weight, 0.bias"),
]

Make = Callable[[], Training]
EQUAL: dict[str, Make] = {}


def equal(make: Make) -> Make:
    EQUAL[make.__name__] = make
    return make


@equal
def a_pointer_into_a_queue() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.queue[self.start : self.start + len(x)] = x.detach()
        self.start = (self.start + len(x)) % len(self.queue)
        return x - self.queue.mean(0)

    return layered(run, start=0, queue=torch.zeros(24, 8))


@equal
def a_mean_in_an_attribute() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean

    return layered(run, "mean", mean=torch.zeros(8))


@equal
def a_mean_in_a_list() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.means[0] = 0.9 * self.means[0] + 0.1 * x.detach().mean(0)
        return x - self.means[0]

    return layered(run, "means", means=[torch.zeros(8)])


@equal
def a_mean_with_accumulation() -> Training:
    training = a_mean_in_an_attribute()
    training.accumulate = 2
    return training


@equal
def a_state_that_is_none_at_first() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        out = x if self.last is None else x + 0.1 * self.last
        self.last = x.detach()
        return out

    return layered(run, "last", last=None)


@equal
def a_queue_of_tensors() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.queue.append(x.detach().mean(0))
        return x - sum(self.queue) / len(self.queue)

    return layered(run, "queue", queue=collections.deque([torch.zeros(8)] * 3, maxlen=3))


@equal
def an_average_of_weights_made_by_the_first_step() -> Training:
    average: dict[str, Tensor] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in average:
                    average[name] = parameter.detach().clone()
                average[name].lerp_(parameter, 0.1)
        return value

    return Training(mlp(), loss, look=lambda: average)


@equal
def a_closure_that_is_written_in_place() -> Training:
    total = torch.zeros(())

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        total.add_(value.detach())
        return value / total

    return Training(mlp(), loss, look=lambda: total)


@equal
def a_closed_over_batch_norm() -> Training:
    teacher = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    return Training(
        mlp(), lambda model, x, y: F.mse_loss(model(x), teacher(x)), look=lambda: [*teacher.state_dict().values()]
    )


@equal
def a_flag_that_initialises_a_buffer() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if not self.ready:
            self.center.copy_(x.detach().mean(0))
            self.ready = True
        return x - self.center

    training = layered(run, "ready", ready=False)
    training.model.get_submodule("1").register_buffer("center", torch.zeros(8))
    return training


@equal
def a_flag_that_initialises_a_parameter() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.ready = True
        return x + self.shift

    return layered(run, "shift", ready=False, shift=nn.Parameter(torch.zeros(8)))


@equal
def a_random_matrix_drawn_by_the_first_step() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if self.matrix is None:
            self.matrix = torch.randn(8, 8)
        return F.dropout(x @ self.matrix, 0.3)

    return layered(run, "matrix", matrix=None)


@equal
def a_first_step_with_another_formula() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if self.first:
            self.first = False
            return x.tanh()
        return 0.5 * x.tanh()

    return layered(run, "first", first=True)


@equal
def a_target_that_is_refreshed_every_other_step() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        if self.steps % 2 == 0:
            self.target = self.linear.weight.detach().clone()
        self.steps += 1
        return self.linear(x) - 0.5 * x @ self.target.T

    return layered(run, "steps", "target", steps=0, target=torch.zeros(8, 8), linear=nn.Linear(8, 8))


@equal
def a_counter_that_nothing_reads() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x.tanh()

    return layered(run, "calls", calls=0)


@equal
def a_weight_that_warms_up() -> Training:
    trainer = types.SimpleNamespace(step=0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        beta = min(1.0, trainer.step / 3)
        trainer.step += 1
        return F.mse_loss(out, y) + beta * out.square().mean()

    return Training(mlp(), loss, look=lambda: trainer.step)


@equal
def a_temperature_that_decays() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.temperature = max(0.5, self.temperature * 0.9)
        return torch.softmax(x / self.temperature, -1)

    return layered(run, "temperature", temperature=2.0)


@equal
def a_counter_on_the_class() -> Training:
    class Trainer:
        steps = 0

        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            self.steps += 1
            return squared_error(model, x, y) / self.steps

    trainer = Trainer()
    return Training(mlp(), trainer.loss, look=lambda: trainer.steps)


@equal
def a_timestep_from_a_counter() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x + self.table(torch.full((len(x),), self.steps, dtype=torch.long))

    return layered(run, "steps", steps=0, table=nn.Embedding(20, 8))


@equal
def a_counter_with_accumulation() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x * (1 + 0.1 * self.steps)

    training = layered(run, "steps", steps=0)
    training.accumulate = 2
    return training


@equal
def a_scale_of_the_reversed_gradient() -> Training:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
            ctx.scale = scale
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return -ctx.scale * gradients[0], None

    def run(self: Any, x: Tensor) -> Tensor:
        self.steps += 1
        return x + Reverse.apply(x, 0.1 * self.steps)

    return layered(run, "steps", steps=0)


@equal
def a_term_from_the_fourth_step_on() -> Training:
    trainer = types.SimpleNamespace(step=0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        trainer.step += 1
        out = model(x)
        return F.mse_loss(out, y) + (out.abs().mean() if trainer.step > 3 else 0.0)

    return Training(mlp(), loss)


@equal
def a_mean_over_counted_steps() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean + (x.detach().mean(0) - self.mean) / self.count
        return x - self.mean

    return layered(run, "count", "mean", count=0, mean=torch.zeros(8))


@equal
def a_weight_tensor_replaced_between_steps() -> Training:
    trainer = types.SimpleNamespace(weight=torch.ones(2))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ((model(x) - y).square() * trainer.weight).mean()

    return Training(mlp(), loss, between=lambda taken: setattr(trainer, "weight", trainer.weight * 0.5))


@pytest.mark.parametrize("name", EQUAL)
def test_it_is_the_ordinary_loop(name: str, program: dict[str, Any]) -> None:
    """Two runs add in another order, so float32 rounding is allowed for: assert_close's 1.3e-6 and 1e-5."""
    expected_training, expected = ordinary(EQUAL[name])
    training, seen = through_a_step(EQUAL[name], **program)
    assert_close(seen, expected)
    assert_close(dict(training.model.state_dict()), dict(expected_training.model.state_dict()))


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PROGRAMS[request.param]


REFUSED: dict[str, tuple[Make, type[Exception], str]] = {}


def refused(kind: type[Exception], sentence: str) -> Callable[[Make], Make]:
    def note(make: Make) -> Make:
        REFUSED[make.__name__] = (make, kind, sentence)
        return make

    return note


@refused(ValueError, "loss_fn<kept> is longer after every forward")
def a_list_of_losses() -> Training:
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(model, x, y)
        kept.append(value.detach())
        return value

    return Training(mlp(), loss)


@refused(ValueError, "model.1.rates is shorter after every forward")
def a_list_that_is_used_up() -> Training:
    return layered(lambda self, x: x * self.rates.pop(), rates=[1.0, 2.0, 3.0, 4.0, 5.0])


@refused(ValueError, "loss_fn<rates> is not what it was after a forward")
def an_iterator() -> Training:
    rates = itertools.cycle([0.1, 1.0])
    return Training(mlp(), lambda model, x, y: next(rates) * squared_error(model, x, y))


@refused(ValueError, r"loss_fn<rates> gives other items at every forward and cannot be set back")
def a_generator() -> Training:
    rates = (0.9**i for i in itertools.count())
    return Training(mlp(), lambda model, x, y: next(rates) * squared_error(model, x, y))


@refused(ValueError, r"model.1.slope \(0.1\): changes at each step .* an operator wants the plain number")
def a_number_that_an_operator_wants_plain() -> Training:
    def run(self: Any, x: Tensor) -> Tensor:
        self.slope += 0.1
        return F.leaky_relu(x, self.slope)

    return layered(run, slope=0.1)


@refused(ValueError, r"reads numpy's|numpy")
def a_number_drawn_by_numpy() -> Training:
    import numpy as np

    return Training(mlp(), lambda model, x, y: float(np.random.rand()) * squared_error(model, x, y))


@refused(ValueError, r"the loss now leaves unread \[\], before \['0.weight', '0.bias'\]; compile another step for it")
def a_layer_that_is_frozen_at_first() -> Training:
    trainer = types.SimpleNamespace(step=0)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        trainer.step += 1
        hidden = model[0](x)
        return F.mse_loss(model[2](model[1](hidden.detach() if trainer.step < 3 else hidden)), y)

    return Training(mlp(), loss)


@refused(RuntimeError, "forward was replaced after the step was compiled")
def a_method_that_is_patched() -> Training:
    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    patched = lambda self, x: x.sigmoid()  # noqa: E731
    return Training(around(Activation()), between=lambda taken: setattr(Activation, "forward", patched))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(name: str) -> None:
    make, kind, sentence = REFUSED[name]
    with pytest.raises(kind, match=sentence):
        through_a_step(make, backend="aot_eager")
