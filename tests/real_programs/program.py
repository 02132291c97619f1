"""A program that people run, as rows of the table have it, and what became of it at a door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

KINDS = {
    "models": "Models",
    "trainers": "Trainers and loops",
    "wrappers": "Wrappers",
    "shapes": "Shapes",
    "containers": "Containers",
}
DOORS = ("step", "sampler", "facade", "explain")
Verdict = Literal["equal", "explained", "refused", "whole model", "differs", "crashes"]


class Training(NamedTuple):
    """A model in training mode, its loss and its batches, the same at every call of who makes it.

    `options`: of `compile_training_step`, beside the optimizer. `loop`: trains `model` in the ordinary way with an
    optimizer and returns the losses; None is the loop of `tests.small_models`.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    batches: list[tuple[Any, ...]]
    options: dict[str, Any] = {}  # noqa: RUF012
    loop: Callable[[Training, Any], list[Tensor]] | None = None


class Sampling(NamedTuple):
    """A model in eval mode and its calls in order, with options of `optimize_sampler`."""

    model: nn.Module
    calls: list[dict[str, Any]]
    options: dict[str, Any] = {}  # noqa: RUF012


class Outcome(NamedTuple):
    """`difference`: the largest of any number to the ordinary program's. `said`: a refusal's sentence, or findings."""

    verdict: Verdict
    difference: float | None = None
    said: str = ""


@dataclass(frozen=True)
class Program:
    """`train`, `sample`: make the program anew. `step`, `facade`: run in place of the door's own way.

    `without`: doors that do not apply. `needs`: a library without which the row is not run.
    """

    train: Callable[[], Training] | None = None
    sample: Callable[[], Sampling] | None = None
    step: Callable[[], Outcome] | None = None
    facade: Callable[[], Outcome] | None = None
    without: tuple[str, ...] = ()
    needs: str = ""
    filters: tuple[str, ...] = field(default=())
