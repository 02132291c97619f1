"""The live numbers: what may be set, what is refused and in which words, and what a checkpoint keeps."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from fusion_compile import optim
from fusion_compile._state.hyperparameters import Hyperparameters

CPU = torch.device("cpu")


def example(**more: Any) -> Hyperparameters:
    return Hyperparameters({"lr": 1e-3, "weight_decay": 0.1, "clip_grad_norm": math.inf, **more}, CPU, torch.float32)


def on_device(h: Hyperparameters) -> dict[str, float]:
    return {name: float(t) for name, t in h.by_name(h.tensor).items()}


def test_a_number_reaches_the_same_device_tensor_and_reads_back_as_it_was_set() -> None:
    h = example()
    address = h.tensor.data_ptr()
    h["lr"] = 0.1
    h["weight_decay"] = 2
    assert (h["lr"], h["weight_decay"]) == (0.1, 2.0)  # not the fp32 neighbour 0.10000000149
    assert on_device(h) == {"lr": pytest.approx(0.1), "weight_decay": 2.0, "clip_grad_norm": math.inf}
    assert h.tensor.data_ptr() == address
    assert list(h) == ["lr", "weight_decay", "clip_grad_norm"] and len(h) == 3


def test_an_unknown_name_lists_the_known_ones_and_guesses() -> None:
    h = example()
    with pytest.raises(
        KeyError,
        match=r"unknown hyperparameter 'weigth_decay'.*lr, weight_decay, clip_grad_norm.*"
        r"Did you mean 'weight_decay'\?",
    ):
        h["weigth_decay"] = 0.1
    with pytest.raises(KeyError) as refused:
        h["xyz"]
    assert "Did you mean" not in str(refused.value) and "lr, weight_decay" in str(refused.value)
    assert list(h) == ["lr", "weight_decay", "clip_grad_norm"]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (float("nan"), ValueError, "'lr' was given nan"),
        (torch.tensor(0.1), TypeError, "'lr' was given a tensor; give a number or a schedule"),
        (True, TypeError, "'lr' was given True"),
        ("0.1", TypeError, "'lr' was given '0.1'"),
        (None, TypeError, "'lr' was given None"),
        (lambda step: math.nan, ValueError, "schedule of hyperparameter 'lr' gave nan at step 0"),
    ],
)
def test_what_is_no_number_is_refused_and_changes_nothing(value: Any, error: type[Exception], words: str) -> None:
    h = example()
    with pytest.raises(error, match=words):
        h["lr"] = value
    assert h["lr"] == 1e-3 and on_device(h)["lr"] == pytest.approx(1e-3)


def test_nothing_can_be_removed() -> None:
    h = example()
    with pytest.raises(TypeError, match="'lr' is part of the compiled program"):
        del h["lr"]


def test_a_schedule_is_written_at_each_step_and_a_number_replaces_it() -> None:
    h = example(lr=optim.linear(1.0, total_steps=4))
    seen = []
    for step in range(5):
        h.apply_schedules(step)
        seen.append(on_device(h)["lr"])
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0]  # exact in binary
    h["lr"] = 0.5
    h.apply_schedules(0)
    assert on_device(h)["lr"] == 0.5
    h["lr"] = lambda step: float(step)
    h.apply_schedules(7)
    assert on_device(h)["lr"] == 7.0


def test_a_state_dict_goes_through_json_and_back_with_schedules_and_infinities() -> None:
    saved = example(lr=optim.cosine(3e-4, total_steps=100, warmup_steps=10, final=1e-5))
    saved["weight_decay"] = 0.3
    loaded = example()
    loaded.update(loaded.read(json.loads(json.dumps(saved.state_dict(), allow_nan=False))))
    assert dict(loaded) == dict(saved)
    for step in (0, 9, 50, 100):
        saved.apply_schedules(step)
        loaded.apply_schedules(step)
        assert on_device(saved) == on_device(loaded)


def test_a_callable_of_the_users_is_saved_by_name_and_kept_on_loading() -> None:
    def mine(step: int) -> float:
        return 1.0 / (step + 1)

    saved = example(lr=mine).state_dict()
    assert "mine" in json.dumps(saved)
    h = example(lr=mine, weight_decay=0.7)
    h.update(h.read(saved))
    assert h["lr"] is mine and h["weight_decay"] == 0.1


def test_names_that_a_checkpoint_has_and_this_step_has_not_are_left_out() -> None:
    h = example()
    h.update(h.read({"lr": 0.5, "momentum": 0.9}))
    assert h["lr"] == 0.5 and "momentum" not in list(h)


def test_reading_changes_nothing_and_names_a_schedule_of_another_version() -> None:
    h = example()
    assert h.read({"lr": 0.5}) == {"lr": 0.5} and h["lr"] == 1e-3
    with pytest.raises(ValueError, match="'lr' follows the schedule 'zigzag', which this version does not have"):
        h.read({"lr": {"schedule": "zigzag", "value": 1.0}})


def test_fp64_models_get_fp64_numbers() -> None:
    h = Hyperparameters({"lr": 0.1}, CPU, torch.float64)
    assert float(h.tensor[0]) == 0.1


def test_a_schedule_that_gives_nan_later_is_refused_and_writes_nothing() -> None:
    numbers = Hyperparameters({"lr": 1.0, "momentum": 0.9}, torch.device("cpu"), torch.float32)
    numbers["momentum"] = lambda step: 0.5
    numbers["lr"] = lambda step: float("nan") if step else 1.0
    before = numbers.tensor.clone()
    with pytest.raises(ValueError, match=r"'lr' gave nan at step 3"):
        numbers.apply_schedules(3)
    assert torch.equal(numbers.tensor, before)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (lambda: 1.0, TypeError, r"schedule of hyperparameter 'lr' cannot be called .*too many positional arguments"),
        (lambda step: "fast", TypeError, r"the schedule of hyperparameter 'lr' gave 'fast' at step 0; a schedule ret"),
        (lambda step: None, TypeError, r"gave None at step 0"),
        (lambda step: True, TypeError, r"gave True at step 0"),
    ],
)
def test_what_is_no_schedule_is_refused(value: Any, error: type[Exception], words: str) -> None:
    h = example()
    with pytest.raises(error, match=words):
        h["lr"] = value
    assert h["lr"] == 1e-3
    h["lr"] = lambda step: value(step) if step else 1.0
    if words.startswith("gave"):
        with pytest.raises(error, match=words.replace("step 0", "step 3")):
            h.apply_schedules(3)


@pytest.mark.parametrize("name", ["clip_grad_norm", "max_norm", "no_decay.max_norm"])
def test_a_negative_bound_on_a_norm_is_refused(name: str) -> None:
    """min(1, -1 / norm) is negative: the step would go uphill."""
    h = example(**{"max_norm": 1.0, "no_decay.max_norm": 1.0})
    with pytest.raises(ValueError, match=rf"hyperparameter '{name}' is -1\.0, but a norm is never negative"):
        h[name] = -1
    h[name] = lambda step: 1.0 - step
    h.apply_schedules(1)
    with pytest.raises(ValueError, match=r"is -1\.0"):
        h.apply_schedules(2)
    h[name] = 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -1.0, r"hyperparameter 'lr' is -1\.0, but a negative rate goes uphill"),
        ("lr", math.inf, "infinite"),
        ("lr", 1e300, r"'lr' is 1e\+300, which is infinite in torch\.float32; give a smaller number"),
        ("weight_decay", -1.0, "makes weights grow"),
        ("beta2", 1.0, "1 excluded"),
        ("beta2", 1 - 1e-9, r"'beta2', given as 0\.999999999 and rounded to torch\.float32, is 1\.0"),
        ("lr", optim.linear(1.0, total_steps=4, final=-1.0), "has this final"),
        ("lr", lambda step: -1.0, r"'lr' is -1\.0"),
    ],
)
def test_a_number_out_of_range_is_refused_when_set_and_when_read_and_changes_nothing(
    name: str, value: Any, words: str
) -> None:
    h = example(beta2=0.9)
    before = dict(h), h.tensor.clone()

    for change in (lambda: h.__setitem__(name, value), lambda: h.update({"clip_grad_norm": 1.0, name: value})):
        with pytest.raises(ValueError, match=words):
            change()
    if isinstance(value, float):
        with pytest.raises(ValueError, match=words):
            h.read({"clip_grad_norm": 1.0, name: value if math.isfinite(value) else str(value)})
    assert dict(h) == before[0] and torch.equal(h.tensor, before[1])


def test_a_schedule_that_leaves_the_range_is_refused_at_that_step_and_writes_nothing() -> None:
    h = example(beta2=0.9)
    h["lr"] = lambda step: 1.0 - step
    h["weight_decay"] = lambda step: 0.5
    h.apply_schedules(1)
    before = h.tensor.clone()
    with pytest.raises(ValueError, match=r"'lr' is -1\.0, but a negative .* Its schedule gave that at step 2: <funct"):
        h.apply_schedules(2)
    assert torch.equal(h.tensor, before)


def test_doubles_keep_what_fp32_would_round_out_of_its_range() -> None:
    h = Hyperparameters({"beta2": 0.9, "lr": 1.0}, CPU, torch.float64)
    h["beta2"] = 1 - 1e-9
    h["lr"] = 1e300
    assert h.tensor.tolist() == [1 - 1e-9, 1e300]


def test_numpys_numbers_are_numbers() -> None:
    h: Any = example()
    h["lr"] = np.float32(0.5)
    assert h["lr"] == 0.5 and type(h["lr"]) is float


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"schedule": "math"}, "the schedule 'math', which this version does not have"),  # a module in that file
        ({"schedule": "Schedule"}, "the schedule 'Schedule', which this version"),
        ({"schedule": "_Decay", "peak": 1.0, "total_steps": 5}, "the schedule '_Decay', which this version"),
        ({"schedule": 7}, "the schedule 7, which this version"),
        ({}, "the schedule '', which this version"),
        ({"schedule": "constant"}, "a schedule 'constant' that cannot be made .*missing"),
        ({"schedule": "linear", "peak": 1.0, "total_steps": -3}, "a schedule 'linear' that cannot be made"),
        ({"schedule": "constant", "value": 1.0, "slope": 2.0}, "a schedule 'constant' that cannot be made .*slope"),
        (None, "is None, no number"),
        (True, "is True, no number"),
        ("fast", "is 'fast', no number"),
        ([0.1], r"is \[0.1\], no number"),
    ],
)
def test_what_a_checkpoint_cannot_have_is_a_sentence(saved: Any, words: str) -> None:
    h = example()
    with pytest.raises(ValueError, match=rf"hyperparameter 'lr' .*{words}"):
        h.read({"lr": saved})
    assert h["lr"] == 1e-3
