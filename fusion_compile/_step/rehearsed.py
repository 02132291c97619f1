"""The step's loss and gradient in the ordinary way, on clones, before anything is captured."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._capture.by_running.leaves import parameters_are_leaves
from fusion_compile._capture.by_running.trace import no_checkpoint_is_reentrant
from fusion_compile._capture.python_state.slots import WHOLE, Slot
from fusion_compile._capture.rehearsal.left_behind import Kind
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal, rehearse, run_once
from fusion_compile._capture.sources.sources import Source, Sources
from fusion_compile._capture.watch.reads import Reads, reading
from fusion_compile._shared_memory import parts_in, sharing
from fusion_compile._state.kept_average import parameters_of
from fusion_compile._step import batches
from fusion_compile._step.containers import map_tensors
from fusion_compile._step.gradient_hooks import hooked_leaf
from fusion_compile._step.gradients import gradients
from fusion_compile._step.learnable import leaves_of, refuse_learnable, trained_by_the_loss
from fusion_compile._step.loss import LossFn, LossModule, check_loss
from fusion_compile._step.loss_scale import SCALE, scaled, unscaled
from fusion_compile._step.micro_batches import Shares, micro_batches, times
from fusion_compile._step.pure_step import StepPlan, weights_at
from fusion_compile._types import Tensors


class Outcome(NamedTuple):
    """What the ordinary loop computes: the loss and the global norm of its gradient, 0-dim, and the buffers then.
    `random`: where it leaves torch's random numbers on the CPU."""

    loss: Tensor
    grad_norm: Tensor
    buffers: Tensors
    random: Tensor | None = None


@dataclass(frozen=True)
class RehearsedStep:
    """What real runs of a step showed.

    Attributes:
        rehearsal: What they leave behind.
        wanted: The outcome of the first.
        sources: What they read from outside of everything that can be reached.
        reads: What user code read in the second, when caches were filled.
        kept_outside: Names of the model's parameters and buffers that the loss reads where it keeps them itself.
        accumulated: Whether another backward than the step's own adds to ``.grad``.
        reads_gradient: Names of parameters whose ``.grad`` the loss reads where they have none.
        changes_batch: Paths in the batch at which the loss puts another value.
    """

    rehearsal: Rehearsal
    wanted: Outcome
    sources: tuple[Source, ...]
    reads: Reads
    kept_outside: tuple[str, ...] = ()
    accumulated: bool = False
    reads_gradient: tuple[str, ...] = ()
    changes_batch: tuple[str, ...] = ()

    def once(self) -> list[Slot]:
        """Where the loss puts what it computes from the first batch alone, or draws once."""
        kinds = (Kind.INITIALISED_ONCE, Kind.DRAWN_ONCE)
        return [
            r.slot for kind in kinds for r in self.rehearsal.of(kind) if r.slot is not None and r.slot.key is not WHOLE
        ]


_NONE = object()


class OrdinaryStep:
    """Forward and backward of a step as the ordinary loop has them, on clones of weights, buffers and batch.

    A call goes on from the buffers that the last one left; `result` says what one computes.

    Attributes:
        given: The batch, cloned.
        others: Tensors with gradients that the loss reads and that are none of the model's parameters.
        accumulated: Whether another backward added to ``.grad``.
        kept_outside: Names of parameters, buffers and averages that the loss reads elsewhere than in the model.
        reads_gradient: Names of parameters whose ``.grad`` the loss reads where they have none.
        changes_batch: Paths in the batch at which the loss puts another value.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, plan: StepPlan, state: Tensors, batch: tuple[Any, ...]
    ) -> None:
        self._parameters = dict(model.named_parameters())
        # Where weights are gathered in the program: with this rank's in the place of all, as the program is proved.
        alone = plan.division.alone() if plan.division is not None else contextlib.nullcontext()
        with torch.no_grad(), alone:
            point = plan.update.gradient_point(state, plan.update.context(state))
            weights = {n: w.clone() for n, w in weights_at(plan, point, state).items()}
        self._model, self._options, self._device = model, plan.options, plan.update.layout.device
        names = tuple(n for n, _ in model.named_buffers())
        self._loss = LossModule(model, loss_fn, names, plan.precision)
        own_buffers = dict(model.named_buffers())
        self._buffers = sharing(own_buffers, {n: b.clone() for n, b in own_buffers.items()}, parts_in(own_buffers))
        self._leaves = {n: hooked_leaf(self._parameters[n], w) for n, w in weights.items()}
        self.given = batches.with_leaves(batch, [batches.clone(t) for t in batches.tensors(batch)])
        self.others: dict[int, Tensor] = {}
        self.kept_outside: set[str] = set()
        self.reads_gradient: set[str] = set()
        self.changes_batch: tuple[str, ...] = ()
        self.accumulated = False
        self._assigned: set[str] = set()
        averages = parameters_of(plan.options.averages)
        self._division = plan.division
        self._scales = {key: state[key] for key in (SCALE,) if key in state}
        self._averages = {name: average.detach() for name, average in averages.items()}
        self._originals = {**self._parameters, **own_buffers, **averages}

    @property
    def weights(self) -> list[Tensor]:
        """The clones that stand in the place of parameters and buffers."""
        return [*self._leaves.values(), *self._buffers.values()]

    @property
    def originals(self) -> list[Tensor]:
        """The model's own, in the order of `weights`."""
        return [self._originals[name] for name in (*self._leaves, *self._buffers)]

    def result(self) -> Outcome:
        """Run forward and backward once."""
        own = {id(leaf) for leaf in self._leaves.values()}
        total = torch.zeros((), device=self._device)
        sums: dict[str, Tensor] = {}
        parts = micro_batches(self.given, self._options.accumulate)
        shares, counts = Shares.of(parts, self._options.weigh_by), list[Tensor | int]()
        known = shares.known_total()
        for i, whole in enumerate(parts):
            part = map_tensors(batches.clone, whole.batch)
            before_it = dict(batches.leaves(part))
            for leaf in self._leaves.values():
                leaf.grad = None
            with (
                torch.enable_grad(),
                no_checkpoint_is_reentrant(),
                self._loss.holding(self._leaves, dict(self._buffers)),
                parameters_are_leaves(self._standing(), self._originals) as stray,
            ):
                value, metrics, _ = self._loss.forward(*part)
                check_loss(value, metrics)
                others = {id(leaf): leaf for leaf in leaves_of(value) if id(leaf) not in own}
                self.others.update(others)
                counts.append(shares.weight(i, metrics))
                # A gradient hook sees what it sees in the ordinary loop, which divides the loss before its backward.
                value = times(value, counts[i]) / (known or 1)
                divided = len(parts) > 1 or bool(self._scales)
                leaves, also = list(self._leaves.values()), trained_by_the_loss(others.values())
                taken = gradients(scaled(value, self._scales), leaves, divided=divided, also=also)
                self.accumulated |= taken.accumulated
                self._go_on({n: self._model.get_buffer(n) for n in self._buffers})
            self.kept_outside.update(n for n, own in self._originals.items() if id(own) in stray.handed)
            self.reads_gradient.update(n for n, leaf in self._leaves.items() if id(leaf) in stray.without_gradient)
            put = [path for path, leaf in batches.leaves(part) if leaf is not before_it.get(path, _NONE)]
            self.changes_batch = tuple(put) or self.changes_batch
            total = total + value.detach()
            for name, gradient in zip(self._leaves, taken.found, strict=True):
                if gradient is not None:
                    before = sums.get(name)
                    sums[name] = gradient if before is None else before + gradient
        sums = unscaled({name: g.detach().float() for name, g in sums.items()}, self._scales)
        if self._division is None:
            squares = [g.detach().float().square().sum() for g in sums.values()]
            norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        else:  # what the program has when it runs on this rank alone
            none = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items() if name not in sums}
            norm = self._division.norm_alone({**{name: g.detach() for name, g in none.items()}, **sums})
        divisor, random = shares.total(counts) if known is None else 1, torch.get_rng_state()
        return Outcome(total / divisor, norm / divisor, {n: b.clone() for n, b in self._buffers.items()}, random)

    def _standing(self) -> Tensors:
        """What stands for tensors that user code keeps. What a forward replaces by another tensor is what it was."""
        buffers = {n: b for n, b in self._buffers.items() if n not in self._assigned}
        return {**self._leaves, **buffers, **self._averages}

    def _go_on(self, buffers: Tensors) -> None:
        """A forward has left these buffers."""
        self._assigned.update(n for n, b in buffers.items() if b is not self._buffers[n])
        self._buffers.update({n: b if b is self._buffers[n] else b.detach() for n, b in buffers.items()})


def outcome_now(
    model: nn.Module, loss_fn: LossFn, plan: StepPlan, state: Tensors, batch: tuple[Any, ...]
) -> Outcome | None:
    """What the ordinary loop would compute now, after one more real run that leaves nothing behind.

    None where there is no memory for it beside the compiled step's.
    """
    step = OrdinaryStep(model, loss_fn, plan, state, batch)
    roots = {"model": model, "loss_fn": loss_fn}
    try:
        found: Outcome = run_once(roots, step.result, batches.tensors(step.given), step.weights)
    except torch.OutOfMemoryError:
        return None
    return found


def rehearse_step(
    model: nn.Module, loss_fn: LossFn, plan: StepPlan, state: Tensors, batch: tuple[Any, ...]
) -> RehearsedStep:
    """Run forward and backward of a step for real, two to four times, and put everything back.

    The weights are clones of those at the gradient point.

    Raises:
        Exception: The loss's own.
        ValueError: The loss depends on learnable tensors outside of the model.
    """
    step = OrdinaryStep(model, loss_fn, plan, state, batch)
    sources, reads = Sources(), reading()
    watching: list[contextlib.AbstractContextManager[Any]] = [sources, reads]
    seen: list[Any] = []

    def run() -> Outcome:
        with watching.pop(0) if watching else contextlib.nullcontext() as seeing:
            seen.append(seeing)
            return step.result()

    roots = {"model": model, "loss_fn": loss_fn}
    try:
        rehearsal = rehearse(roots, run, batches.tensors(step.given), step.weights, step.originals)
    except torch.OutOfMemoryError as error:
        error.add_note(
            "The loss and its gradient were computed in the ordinary way, on copies of the weights, to see what they "
            "leave behind. compile_training_step(rehearse=False) leaves that out."
        )
        raise
    refuse_learnable(step.others.values(), roots, [record.label for record in rehearsal.of(Kind.WRITTEN)])
    kept_outside = tuple(sorted(step.kept_outside))
    found = tuple(sources.found)
    return RehearsedStep(
        rehearsal,
        rehearsal.results[0],
        found,
        seen[1],
        kept_outside,
        step.accumulated,
        tuple(sorted(step.reads_gradient)),
        step.changes_batch,
    )
