"""Run a program through each door, and compare it with the ordinary program."""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.passes._compat import tree_leaves
from tests.models.exported.run import _without_folders as without_folders
from tests.real_programs.program import Outcome, Program, Sampling, Training
from tests.small_models import torch_loop

LR, EPS = 1e-3, 1e-4
"""Adam's eps is far above the rounding of a gradient that is zero (a key's bias), which 1e-8 makes steps of."""
RELATIVE, ABSOLUTE = 1e-4, 2e-6
"""fp32 sums of another order: a few steps of lr 1e-3 carry a gradient's rounding of 1e-6 into the weights."""

PACKAGE = str(Path(fc.__file__).parent)


def run_door(program: Program, door: str) -> Outcome | None:
    """What becomes of `program` at `door`; None where it does not apply."""
    if door in program.without:
        return None
    torch.compiler.reset()
    with warnings.catch_warnings(), _torch_settings():
        warnings.simplefilter("ignore")
        if door == "step":
            return program.step() if program.step else _if(program.train, step_outcome)
        if door == "facade":
            return program.facade() if program.facade else _if(program.train, facade_outcome)
        if door == "sampler":
            return _if(program.sample, sampler_outcome)
        return _if(program.train, explained_step) or _if(program.sample, explained_sampler)


def _if(make: Callable[[], Any] | None, run: Callable[[Callable[[], Any]], Outcome]) -> Outcome | None:
    return None if make is None else run(make)


@contextlib.contextmanager
def _torch_settings() -> Iterator[None]:
    """Random numbers are as they were afterwards, and no process group stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


# ---- the training step and the torch optimizer


def ordinary(training: Training) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and weights of the ordinary loop with ``torch.optim.AdamW``."""
    torch.manual_seed(1)
    if training.loop is not None:
        made = torch.optim.AdamW(_trained(training.model), lr=LR, eps=EPS)
        return training.loop(training, made), weights(training.model)
    return torch_loop(training.model, training.batches, training.loss_fn, lr=LR, eps=EPS), weights(training.model)


def step_outcome(make: Callable[[], Training]) -> Outcome:
    """Captured as ATen operators, against the ordinary loop; where that is refused for ``mode="eager"``, in that."""

    def run(training: Training, **options: Any) -> list[Tensor]:
        step = step_of(training, **options)
        losses = [_taken(step, batch) for batch in training.batches]
        step.release()
        return losses

    outcome = compared(make, run)
    if outcome.verdict != "refused" or "mode='eager'" not in outcome.said:
        return outcome
    uncaptured = compared(make, functools.partial(run, mode="eager"))
    return outcome._replace(difference=uncaptured.difference) if uncaptured.verdict == "equal" else uncaptured


def _taken(step: fc.TrainingStep, batch: tuple[Any, ...]) -> Tensor:
    before = weights(step.model)
    try:
        return step(*batch).clone()
    except Exception as error:
        raise _Stopped(_differing(before, weights(step.model))) from error


class _Stopped(Exception):
    """A step's error is the cause; what it changed all the same is the argument."""


def facade_outcome(make: Callable[[], Training]) -> Outcome:
    """The ordinary loop with the package's AdamW in it, against torch's."""

    def run(training: Training) -> list[Tensor]:
        optimizer = facade_of(training.model)
        if training.loop is not None:
            return training.loop(training, optimizer)
        losses = []
        for batch in training.batches:
            optimizer.zero_grad()
            loss = training.loss_fn(training.model, *batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    return compared(make, run)


def step_of(training: Training, **options: Any) -> fc.TrainingStep:
    """The training step of a row."""
    adamw = fc.optim.adamw(LR, eps=EPS)
    chosen = {"optimizer": adamw, "backend": "aot_eager", **training.options, **options}
    return fc.compile_training_step(training.model, training.loss_fn, **chosen)


def facade_of(params: Any, **options: Any) -> Any:
    """The torch optimizer of a row."""
    return fc.optim.as_torch_optimizer(params, fc.optim.adamw(LR, eps=EPS), mode="eager", **options)


def compared(make: Callable[[], Training], run: Callable[[Training], list[Tensor]]) -> Outcome:
    """`run` on a program of `make` against the ordinary loop on another: losses, weights, and no change if refused."""
    torch.manual_seed(0)
    losses, expected = ordinary(make())
    torch.manual_seed(0)
    training = make()
    before = weights(training.model)
    torch.manual_seed(1)
    try:
        got = run(training)
    except _Stopped as stopped:
        assert isinstance(stopped.__cause__, Exception)
        return refused(stopped.__cause__, changed=stopped.args[0])
    except Exception as error:
        return refused(error, changed=_differing(before, weights(training.model)))
    return judged([*got, *weights(training.model).values()], [*losses, *expected.values()])


def judged(got: list[Tensor], expected: list[Tensor]) -> Outcome:
    """Equal but for rounding, or not, with the largest difference."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    largest = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    close = all(torch.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE) for a, b in pairs)
    return Outcome("equal" if close else "differs", largest)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters and of the buffers that are floats."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return {n: t.detach().clone() for n, t in {**trained, **kept}.items() if type(t.detach()) is Tensor}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _differing(before: dict[str, Tensor], now: dict[str, Tensor]) -> list[str]:
    return [n for n, t in before.items() if n not in now or not torch.equal(t, now[n])]


def refused(error: Exception, changed: list[str]) -> Outcome:
    """A refusal, where the package's own code raised a sentence and nothing had changed; else a crash."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    sentence = without_folders(re.sub(r"\s+", " ", str(error)).strip())
    ours = last.startswith(PACKAGE) and isinstance(error, (ValueError, TypeError, RuntimeError))
    if not ours:
        return Outcome("crashes", said=f"{type(error).__name__}: {sentence[:300]}")
    return (
        Outcome("crashes", said=f"{changed[0]} changed: {sentence}") if changed else Outcome("refused", said=sentence)
    )


# ---- the sampler


def sampler_outcome(make: Callable[[], Sampling]) -> Outcome:
    """Every call, bitwise, and what `release_weights` leaves, against the model."""
    torch.manual_seed(0)
    sampling = make()
    torch.manual_seed(0)
    plain = make()
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sampler = _sampler_of(sampling)
            pairs = [(sampler(**call), plain.model(**call)) for call in sampling.calls]
    except Exception as error:
        return refused(error, [])
    said = [without_folders(str(w.message)) for w in caught if "whole model serves" in str(w.message)]
    if any(type(a) is not type(b) for a, b in pairs):
        return Outcome("differs", said=f"the output is a {type(pairs[0][0]).__name__}")
    difference = max(_difference(a, b) for a, b in pairs)
    if difference != 0:
        return Outcome("differs", difference)
    return Outcome("whole model", 0.0, said[0]) if said else Outcome("equal", 0.0)


def _sampler_of(sampling: Sampling) -> fc.Sampler:
    return fc.optimize_sampler(sampling.model, **{"n_steps": 4, "mode": "eager", **sampling.options})


def _difference(got: Any, expected: Any) -> float:
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


# ---- explain


def explained_step(make: Callable[[], Training]) -> Outcome:
    """The step of the first batch: a graph with costs, findings at lines, and everything put back."""
    torch.manual_seed(0)
    training = make()
    before = weights(training.model)
    try:
        step = step_of(training)
        told = fc.explain(step, training.batches[0])
    except Exception as error:
        said = refused(error, _differing(before, weights(training.model)))
        return said if said.verdict == "crashes" else _explained_loss(make)
    return _report(told, _differing(before, weights(step.model)))


def _explained_loss(make: Callable[[], Training]) -> Outcome:
    """Where a step is refused: its loss as a function, as someone who looks for the reason explains it."""
    torch.manual_seed(0)
    training = make()
    before = weights(training.model)

    def loss(*batch: Any) -> Any:
        return training.loss_fn(training.model, *batch)

    try:
        told = fc.explain(loss, training.batches[0], backend="eager")
    except Exception as error:
        return refused(error, _differing(before, weights(training.model)))
    return _report(told, _differing(before, weights(training.model)))


def explained_sampler(make: Callable[[], Sampling]) -> Outcome:
    """The sampler after its first call."""
    torch.manual_seed(0)
    sampling = make()
    try:
        with torch.no_grad():
            sampler = _sampler_of(sampling)
            sampler(**sampling.calls[0])
            told = sampler.explain()
    except Exception as error:
        return refused(error, [])
    return _report(told, [])


def _report(told: fc.Explanation, changed: list[str]) -> Outcome:
    faults = [f"{changed[0]} changed" if changed else ""]
    faults += [note for note in told.notes if "no costs" in note]
    faults += [f"{f.kind} at {f.where}" for f in told.findings if f.where.startswith(PACKAGE)]
    faults += ["a graph without nodes" for graph in told.graphs if not graph.nodes]
    faults += ["it reads back as another" if fc.Explanation.from_json(told.to_json()) != told else ""]
    if any(faults):
        return Outcome("crashes", said=without_folders(next(filter(None, faults))))
    counted = {kind: [f.kind for f in told.findings].count(kind) for kind in sorted({f.kind for f in told.findings})}
    return Outcome("explained", said=", ".join(f"{n} {kind}" for kind, n in counted.items()))
