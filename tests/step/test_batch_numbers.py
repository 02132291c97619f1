"""Python numbers in a batch: inputs of one program in arithmetic, and a program for each value elsewhere."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step import shapes
from fusion_compile._step.batch_numbers import BatchNumbers
from tests.refusals import refused
from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop

pytestmark = pytest.mark.filterwarnings(
    "ignore:the step is captured by running:UserWarning", "ignore:batch:UserWarning"
)
WAYS: dict[str, dict[str, Any]] = {
    "captured": {"backend": "aot_eager"},
    "read": {"backend": "aot_eager", "capture": "read"},
    "eager": {"mode": "eager"},
}


class Task(enum.Enum):
    DENOISE = "denoise"
    INVERT = "invert"


@dataclass
class Noisy:
    x: Tensor
    sigma: float


def scaled(model: nn.Module, x: Tensor, y: Tensor, scale: float) -> Tensor:
    return F.mse_loss(model(x) * scale + 0.1 * scale**2, y)


def branched(model: nn.Module, x: Tensor, y: Tensor, epoch: int) -> Tensor:
    return F.mse_loss(model(x), y) * (2.0 if epoch >= 2 else 1.0)


def repeated(model: nn.Module, x: Tensor, y: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = x + 0.1 * x.flip(1)
    return F.mse_loss(model(x), y)


def plain_argument(model: nn.Module, x: Tensor, y: Tensor, slope: float) -> Tensor:
    return F.mse_loss(F.leaky_relu(model(x), slope), y)


def unread(model: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    return F.mse_loss(model(x), y)


def by_task(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> Tensor:
    return F.mse_loss(model(x), y if task is Task.DENOISE else -y)


def masked(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    return F.mse_loss(model(x) if mask is None else model(x) * mask, y)


def in_a_dataclass(model: nn.Module, noisy: Noisy, y: Tensor) -> Tensor:
    return F.mse_loss(model(noisy.x) / (1 + noisy.sigma), y)


Case = tuple[Callable[..., Tensor], Callable[[int], Any], int]
CASES: dict[str, Case] = {
    "arithmetic": (scaled, lambda i: 0.5 + 0.125 * i, 1),
    "a whole number in arithmetic": (scaled, lambda i: i, 1),
    "a branch": (branched, lambda i: i, 2),
    "a loop": (repeated, lambda i: i % 2, 2),
    "an operator's plain argument": (plain_argument, lambda i: (0.1, 0.2)[i % 2], 2),
    "unread": (unread, lambda i: 1000 - i, 1),
    "an enumeration": (by_task, lambda i: (Task.DENOISE, Task.INVERT)[i % 2], 2),
    "None or a tensor": (masked, lambda i: None if i % 2 else torch.tensor([1.0, 0.5]), 2),
}


def given(which: str, n: int = 4) -> list[tuple[Any, ...]]:
    return [(x, y, CASES[which][1](i)) for i, (x, y) in enumerate(batches(n))]


QUICK = {"arithmetic", "a branch", "an operator's plain argument", "None or a tensor"}


@pytest.mark.parametrize(
    ("which", "way"),
    [
        pytest.param(
            w, way, marks=() if way == "eager" or (way == "captured" and w in QUICK) else pytest.mark.exhaustive
        )
        for w in CASES
        for way in WAYS
    ],
)
def test_it_is_the_ordinary_loop(which: str, way: str) -> None:
    loss, _, programs = CASES[which]
    model, reference, data = mlp(), mlp(), given(which)
    step = compiled(model, loss, lr=1e-2, **WAYS[way])
    losses = [step(*batch) for batch in data]
    torch.testing.assert_close(losses, torch_loop(reference, data, loss, lr=1e-2), rtol=1e-5, atol=1e-6)
    assert_same_weights(model, reference)
    if way == "captured":
        assert len(step.programs) == programs


def test_numbers_deep_in_a_batch_and_beside_micro_batches() -> None:
    data = [(Noisy(x, 0.25 * i), y) for i, (x, y) in enumerate(batches(4))]
    whole, cut = mlp(), mlp()
    one, two = compiled(whole, in_a_dataclass, lr=1e-2), compiled(cut, in_a_dataclass, lr=1e-2, accumulate=2)
    for batch in data:
        torch.testing.assert_close(one(*batch), two(*batch), rtol=1e-5, atol=1e-6)
    assert_same_weights(cut, whole)
    assert len(one.programs) == len(two.programs) == 1


def test_a_number_that_decides_has_a_program_for_each_value_up_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MAX_PROGRAMS", 3)
    step = compiled(mlp(), plain_argument)
    (x, y), *_ = batches(1)
    for i in range(3):
        step(x, y, 0.01 * (i + 1))
    with refused(step, ValueError, "program number 4 for one batch shape", "of the loss or the batch", "0-dim tensor"):
        step(x, y, 0.5)
    step(x, y, 0.03)
    assert len(step.programs) == 3


def test_a_constant_that_changes_is_said_and_bounded() -> None:
    step = compiled(mlp(), lambda m, x, y, caption: F.mse_loss(m(x), y), max_shapes=2, rehearse=False)
    (x, y), *_ = batches(1)
    step(x, y, "a cat")
    with pytest.warns(UserWarning, match=r"batch\[2\] is another one than before, .* what the loss does not read"):
        step(x, y, "a dog")
    step(x, y, "a cat")
    with refused(step, ValueError, "batch shape number 3", "Each value of batch[2] counts as a shape, too"):
        step(x, y, "a bird")


def test_a_number_of_another_type_is_another_program() -> None:
    step = compiled(mlp(), scaled)
    (x, y), *_ = batches(1)
    assert torch.equal(step(x, y, 1), compiled(mlp(), scaled)(x, y, 1.0))
    step(x, y, 1.5)
    assert len(step.programs) == 2


def test_a_resumed_run_does_not_keep_a_batchs_number() -> None:
    step, resumed = compiled(mlp(), scaled), compiled(mlp(), scaled)
    first, second = given("arithmetic", 2)
    step(*first)
    saved = step.state_dict()
    assert saved["numbers"] == {}
    resumed.load_state_dict(saved)
    assert torch.equal(step(*second), resumed(*second))


def test_numbers_are_put_where_they_lie() -> None:
    numbers = BatchNumbers()
    x = torch.zeros(2)
    numbers.hold((x, 2, {"scale": 0.5}))
    assert [slot.label for slot in numbers.slots] == ["batch[1]", "batch[2]['scale']"]
    numbers.hold((x, 3, {"scale": 1.5}))
    assert numbers.put((x, 2, {"scale": 0.5}))[1:] == (3, {"scale": 1.5})
    assert "batch[1] is a plain number (and 1 more)" in numbers.because()
