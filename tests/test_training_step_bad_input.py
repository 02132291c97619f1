"""What a training step refuses: each refusal is a sentence, changes no bit, and leaves the step usable."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.refusals import refused, works
from tests.small_models import PROGRAMS, assert_same_weights, batches, compiled, mlp, squared_error, torch_loop

Fault = Callable[[Tensor, Tensor, Tensor], Any]


class Faulty:
    """A loss that has a fault until it is repaired."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.repaired = False

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Any:
        out = model(x)
        return F.mse_loss(out, y) if self.repaired else self.fault(out, x, y)


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a step that runs uncompiled, and of one that is captured."""
    return PROGRAMS[request.param]


# ---------------------------------------------------------------------- losses

WRONG_RESULTS: dict[str, tuple[Fault, type[Exception], str]] = {
    "a vector": (lambda out, x, y: out.sum(1), ValueError, "loss of shape [8]; return a scalar"),
    "None": (lambda out, x, y: None, TypeError, "returned a NoneType; return a 0-dim tensor"),
    "a number": (lambda out, x, y: 0.5, TypeError, "returned a float; return a 0-dim tensor"),
    "an integer": (lambda out, x, y: (out > 0).sum(), TypeError, "dtype torch.int64; return a floating-point"),
    "of the batch alone": (lambda out, x, y: x.sum(), ValueError, "does not depend on any trainable parameter"),
    "detached": (lambda out, x, y: out.detach().sum(), ValueError, "does not depend on any trainable parameter"),
    "of another leaf": (
        lambda out, x, y: torch.ones((), requires_grad=True) * x.sum(),
        ValueError,
        "does not depend on any trainable parameter",
    ),
    "metrics in a list": (lambda out, x, y: (out.sum(), [out.sum()]), TypeError, "must be a dictionary of tensors"),
    "a metric that is a number": (
        lambda out, x, y: (out.sum(), {"n": 3}),
        TypeError,
        "must be a dictionary of tensors",
    ),
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_a_loss_of_the_wrong_kind_is_refused(kind: str) -> None:
    fault, error, words = WRONG_RESULTS[kind]
    loss = Faulty(fault)
    step = compiled(mlp(), loss, mode="eager")
    with refused(step, error, words):
        step(*batches(1)[0])
    loss.repaired = True
    assert works(step)


# One line each: the message must name exactly that line.
HOST_READS: dict[str, Fault] = {
    ".item()": lambda out, x, y: out.sum() * out.detach().sum().item(),
    ".tolist()": lambda out, x, y: out.sum() * out.detach().tolist()[0][0],
    "float()": lambda out, x, y: out.sum() * float(out.detach().sum()),
    "print": lambda out, x, y: (out.sum(), print(out))[0],
    "an f-string": lambda out, x, y: (out.sum(), f"{x.sum():.3f}")[0],
    "if": lambda out, x, y: out.sum() if out.sum() > 0 else -out.sum(),
    ".cpu()": lambda out, x, y: out.cpu().sum(),
    ".numpy()": lambda out, x, y: out.sum() * float(out.detach().numpy()[0, 0]),
    "torch.nonzero": lambda out, x, y: out.sum() * torch.nonzero(x > 0).shape[0],
    "a mask": lambda out, x, y: out[y > 0].sum(),
    "torch.equal": lambda out, x, y: out.sum() * torch.equal(x, x + 1),
}


@pytest.mark.parametrize("kind", HOST_READS)
def test_a_host_read_in_a_captured_loss_names_the_users_line(kind: str) -> None:
    fault = HOST_READS[kind]
    step = compiled(mlp(), Faulty(fault))
    line = f"{__file__}:{fault.__code__.co_firstlineno}: "
    with refused(step, ValueError, line, "reads a tensor's value on the host", "torch.where instead of if", "'eager'"):
        step(*batches(1)[0])


@pytest.mark.parametrize("kind", HOST_READS)
def test_uncaptured_a_loss_may_read_on_the_host(kind: str) -> None:
    model, reference, loss = mlp(), mlp(), Faulty(HOST_READS[kind])
    step = compiled(model, loss, mode="eager")
    losses = [step(*batch) for batch in batches(3)]
    torch.testing.assert_close(losses, torch_loop(reference, batches(3), loss))
    assert_same_weights(model, reference)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x  # the line that the message must name


def test_a_host_read_in_the_model_names_the_models_line() -> None:
    step = compiled(nn.Sequential(Gated(4, 4), nn.Linear(4, 2)))
    with refused(step, ValueError, f"{__file__}:{Gated.forward.__code__.co_firstlineno + 1}: "):
        step(*batches(1)[0])


def test_code_that_dynamo_cannot_trace_names_the_users_line() -> None:
    import _thread

    lock = _thread.allocate_lock()
    fault: Fault = lambda out, x, y: (out.sum(), lock.acquire(False))[0]  # noqa: E731
    step = compiled(mlp(), Faulty(fault), capture="read")
    with refused(step, ValueError, f"{__file__}:{fault.__code__.co_firstlineno}", "cannot be captured as one graph"):
        step(*batches(1)[0])


@pytest.mark.parametrize("run", [1, 2, 3], ids=["when it is rehearsed", "when it is repeated", "when it is examined"])
def test_a_loss_that_raises_leaves_the_step_as_it_was(
    run: int, program: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm would show a half-done forward. The count is kept where no rehearsal looks, in a function of torch."""
    runs: list[int] = []
    own = F.mse_loss

    def raising(*given: Any, **named: Any) -> Tensor:
        if not named:  # else torch calls it again below a torch function mode
            runs.append(1)
            if len(runs) >= run:
                raise ArithmeticError("the user's own")
        return own(*given, **named)

    step = compiled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), **program)
    monkeypatch.setattr(F, "mse_loss", raising)
    eager = step.mode == "eager"
    with refused(step, ArithmeticError if run == 1 or eager else ValueError, "the user's own"):
        step(*batches(1)[0])
    monkeypatch.undo()
    # What cannot run twice in a row is examined all the same; and in mode "eager", after that failed, run on clones.
    assert len(runs) == run + (run == 2) + (eager and run > 1) and step.programs == [] and works(step)


def _with_metric(name: str, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return out.sum(), {name: out.detach().sum()}


def test_a_metric_must_not_take_a_name_of_the_step() -> None:
    for name in ("loss", "skipped", "lr", "clip_grad_norm"):
        loss = Faulty(partial(_with_metric, name))
        step = compiled(mlp(), loss, mode="eager")
        with refused(step, ValueError, f"the metric name {name!r} is taken"):
            step(*batches(1)[0])
        loss.repaired = True
        assert works(step)


# ---------------------------------------------------------------------- batches

X, Y = batches(1)[0]
WRONG_BATCHES: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "of another dtype": ((X.double(), Y), ValueError, ("batch[0] is torch.float64", "compiled for torch.float32")),
    "on another device": (
        (X.to("meta"), Y),
        ValueError,
        ("batch[0] [8, 4] is on meta, but the model is on cpu", ".to('cpu'"),
    ),
    "with an object": ((X, range(3)), TypeError, ("batch[1] is a range (range(0, 3))", "give tensors, numbers")),
    "with an object deep inside": ((X, {"y": [3j]}), TypeError, ("batch[1]['y'][0] is a complex (3j)",)),
    "with a part too many": ((X, Y, Y), TypeError, ("takes 3 positional arguments but 4 were given",)),
    "with a part too few": ((X,), TypeError, ("missing 1 required positional argument",)),
    "that wants a gradient": (
        (X.clone().requires_grad_(), Y),
        ValueError,
        ("batch[0]", "requires a gradient", ".detach()"),
    ),
}


@pytest.mark.parametrize("kind", WRONG_BATCHES)
def test_a_batch_unlike_the_first_is_refused(kind: str) -> None:
    batch, error, words = WRONG_BATCHES[kind]
    step = compiled(mlp(), accumulate=4, mode="eager")
    step(X, Y)
    with refused(step, error, *words):
        step(*batch)
    assert works(step)


@pytest.mark.parametrize("kind", ["on another device", "with an object", "that wants a gradient"])
def test_such_a_batch_is_refused_as_the_first_one_too(kind: str) -> None:
    batch, error, words = WRONG_BATCHES[kind]
    step = compiled(mlp(), accumulate=4, mode="eager")
    with refused(step, error, *words):
        step(*batch)
    assert works(step)


def test_a_shape_beyond_the_bound_is_refused() -> None:
    step = compiled(mlp(), max_shapes=1)
    step(X, Y)
    with refused(step, ValueError, "batch shape number 2", "drop_last=True", "dynamic=True", "max_shapes=…"):
        step(X[:4], Y[:4])
    assert works(step)


def test_a_loss_that_reads_other_weights_at_another_batch_shape_is_refused() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        return F.mse_loss(model(x) if len(x) == 8 else model.get_submodule("0")(x)[:, :2], y)

    step = compiled(mlp(), loss)
    step(X, Y)
    with refused(step, ValueError, "with this batch shape the loss leaves unread ['2.weight', '2.bias'], before []"):
        step(X[:4], Y[:4])
    assert works(step)


# ---------------------------------------------------------------------- models and options


def test_a_model_without_trainable_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter; set requires_grad=True"):
        compiled(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        compiled(nn.Tanh())


def _with_parameter(tensor: Tensor) -> nn.Module:
    model = mlp()
    model.odd = nn.Parameter(tensor)
    return model


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (
            torch.zeros(3, dtype=torch.complex64),
            r"odd \[3\] is a torch.complex64 Tensor; a bank holds dense floating-point",
        ),
        (torch.eye(3).to_sparse(), r"odd \[3, 3\] is a torch.sparse_coo torch.float32 Tensor"),
        (torch.zeros(3, device="meta"), "parameters lie on cpu, meta; move them to one device"),
    ],
    ids=["complex", "sparse", "on another device"],
)
def test_a_parameter_that_no_bank_holds_is_refused_and_the_model_untouched(tensor: Tensor, words: str) -> None:
    model = _with_parameter(tensor)
    places = [p.data_ptr() for p in mlp_parameters(model)]
    with pytest.raises(ValueError, match=words):
        compiled(model)
    assert [p.data_ptr() for p in mlp_parameters(model)] == places


def mlp_parameters(model: nn.Module) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if n != "odd"]


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown recipe": (
        {"optimizer": "adamv"},
        ValueError,
        "'adamv' is not a recipe; use one of adamw, lion, muon, normuon",
    ),
    "a torch optimizer": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)},
        TypeError,
        r"optimizer is a SGD; give a recipe's name \(adamw.*a torch.optim.Optimizer cannot be captured",
    ),
    "a class of torch.optim": (
        {"optimizer": torch.optim.AdamW},
        TypeError,
        "optimizer is the class AdamW; give a recipe's name",
    ),
    "a direction without a step": (
        {"optimizer": fc.optim.scale_by_adam()},
        ValueError,
        r"scale_by_adam takes no step.*chain\(scale_by_adam, scale_by_learning_rate\(1e-3\)\)",
    ),
    "an lr that nothing reads": (
        {"optimizer": fc.optim.hyperball(fc.optim.Named("angle", 0.02)), "lr": 1e-3},
        ValueError,
        "hyperball has no hyperparameter 'lr'; it has angle",
    ),
    "an lr that is a tensor": ({"lr": torch.tensor(1e-3)}, TypeError, "'lr' was given a tensor; give a number"),
    "an lr that is nan": ({"lr": float("nan")}, ValueError, "'lr' was given nan"),
    "no micro-batch": ({"accumulate": 0}, ValueError, "accumulate=0 is not a number of micro-batches"),
    "half a micro-batch": ({"accumulate": 2.5}, ValueError, "accumulate=2.5 is not a number of micro-batches"),
    "an integer compute_dtype": (
        {"compute_dtype": torch.int8},
        ValueError,
        "torch.int8 is none that autocast",
    ),
    "an unknown mode": ({"mode": "fast"}, ValueError, "mode='fast' is not known; use one of 'default'"),
    "a pattern that fits nothing": (
        {"force_scalar": ["blocks"]},
        ValueError,
        "'blocks' matches no trainable parameter",
    ),
}


@pytest.mark.parametrize("kind", WRONG_OPTIONS)
def test_a_wrong_option_is_refused_and_the_model_untouched(kind: str) -> None:
    options, error, words = WRONG_OPTIONS[kind]
    model = mlp()
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(error, match=words):
        compiled(model, **options)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_what_is_no_model_or_no_loss_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a function; compile_training_step needs a torch.nn.Module"):
        compiled(squared_error)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss_fn is a Tensor; it must be callable as loss_fn\(model, \*batch\)"):
        fc.compile_training_step(mlp(), torch.zeros(()))  # type: ignore[arg-type]


WRONG_NUMBERS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "unknown": (
        "lrr",
        0.1,
        KeyError,
        "unknown hyperparameter 'lrr'; this step has beta1, beta2, eps, weight_decay, lr, ",
    ),
    "a tensor": ("lr", torch.tensor(0.1), TypeError, "give a number or a schedule"),
    "a string": ("lr", "0.1", TypeError, "was given '0.1'; give a number or a schedule"),
    "nan": ("lr", float("nan"), ValueError, "was given nan"),
}


@pytest.mark.parametrize("kind", WRONG_NUMBERS)
def test_a_wrong_hyperparameter_is_refused(kind: str) -> None:
    name, value, error, words = WRONG_NUMBERS[kind]
    step = compiled(mlp(), mode="eager")
    with refused(step, error, words):
        step.hyperparameters[name] = value
    assert works(step)


def test_a_close_hyperparameter_is_suggested_and_none_can_be_removed() -> None:
    step = compiled(mlp(), mode="eager")
    with refused(step, KeyError, "Did you mean 'weight_decay'?"):
        step.hyperparameters["weightdecay"]
    with refused(step, TypeError, "'lr' is part of the compiled program and cannot be removed"):
        del step.hyperparameters["lr"]


def test_a_step_cannot_be_copied_and_says_what_can() -> None:
    """A copy's parameters were no longer the views into its banks."""
    step = fc.compile_training_step(nn.Linear(2, 2), lambda model, x: model(x).sum(), mode="eager")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled\. Save its state .*step\.model"):
            copied(step)
