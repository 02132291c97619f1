"""The step's loss and gradient in the ordinary way, on clones, before anything is captured."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._capture.by_running.leaves import parameters_are_leaves
from fusion_compile._capture.by_running.trace import no_checkpoint_is_reentrant
from fusion_compile._capture.rehearsal.left_behind import Kind
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal, rehearse
from fusion_compile._capture.sources.sources import Source, Sources
from fusion_compile._capture.watch.reads import Reads, reading
from fusion_compile._step import batches
from fusion_compile._step.gradient_hooks import hooked_leaf
from fusion_compile._step.learnable import leaves_of, refuse_learnable
from fusion_compile._step.loss import LossFn, LossModule, check_loss
from fusion_compile._step.pure_step import StepPlan, weights_at
from fusion_compile._types import Tensors


class Outcome(NamedTuple):
    """What the ordinary loop computes: the loss and the global norm of its gradient, 0-dim, and the buffers then."""

    loss: Tensor
    grad_norm: Tensor
    buffers: Tensors


@dataclass(frozen=True)
class RehearsedStep:
    """What real runs of a step showed.

    Attributes:
        rehearsal: What they leave behind.
        wanted: The outcome of the first.
        sources: What they read from outside of everything that can be reached.
        reads: What user code read in the second, when caches were filled.
    """

    rehearsal: Rehearsal
    wanted: Outcome
    sources: tuple[Source, ...]
    reads: Reads


def rehearse_step(
    model: nn.Module, loss_fn: LossFn, plan: StepPlan, state: Tensors, batch: tuple[Any, ...]
) -> RehearsedStep:
    """Run forward and backward of a step for real, two to four times, and put everything back.

    The weights are clones of those at the gradient point.

    Raises:
        Exception: The loss's own.
        ValueError: The loss runs once, but not twice in a row, or depends on learnable tensors outside of the model.
    """
    options, parameters = plan.options, dict(model.named_parameters())
    with torch.no_grad():
        point = plan.update.gradient_point(state, plan.update.context(state))
        weights = {n: w.clone() for n, w in weights_at(plan, point).items()}
    loss = LossModule(model, loss_fn, tuple(n for n, _ in model.named_buffers()), plan.precision)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    given = batches.with_leaves(batch, [t.clone() for t in batches.tensors(batch)])
    leaves = {n: hooked_leaf(parameters[n], w) for n, w in weights.items()}
    own, others = {id(leaf) for leaf in leaves.values()}, dict[int, Tensor]()
    sources, reads = Sources(), reading()
    watching: list[contextlib.AbstractContextManager[Any]] = [sources, reads]
    seen: list[Any] = []

    def run() -> Outcome:
        with watching.pop(0) if watching else contextlib.nullcontext() as seeing:
            seen.append(seeing)
            return once()

    def once() -> Outcome:
        total = torch.zeros((), device=plan.update.layout.device)
        gradients: dict[str, Tensor] = {}
        for i in range(options.accumulate):
            whole = batches.part(given, i, options.accumulate)
            part = batches.with_leaves(whole, [t.clone() for t in batches.tensors(whole)])
            with (
                torch.enable_grad(),
                no_checkpoint_is_reentrant(),
                loss.holding(leaves, dict(buffers)),
                parameters_are_leaves(leaves, parameters),
            ):
                value, metrics, _ = loss(*part)
                check_loss(value, metrics)
                others.update({id(leaf): leaf for leaf in leaves_of(value) if id(leaf) not in own})
                found = torch.autograd.grad(value / options.accumulate, list(leaves.values()), allow_unused=True)
                buffers.update({n: model.get_buffer(n).detach() for n in buffers})
            total = total + value.detach() / options.accumulate
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    before = gradients.get(name)
                    gradients[name] = gradient if before is None else before + gradient
        squares = [g.detach().float().square().sum() for g in gradients.values()]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        return Outcome(total, norm, {n: b.clone() for n, b in buffers.items()})

    roots = {"model": model, "loss_fn": loss_fn}
    try:
        rehearsal = rehearse(roots, run, batches.tensors(given), [*leaves.values(), *buffers.values()])
    except torch.OutOfMemoryError as error:
        error.add_note(
            "The loss and its gradient were computed in the ordinary way, on copies of the weights, to see what they "
            "leave behind. compile_training_step(rehearse=False) leaves that out."
        )
        raise
    except Exception as error:
        if len(seen) < 2:
            raise
        notes = " ".join(getattr(error, "__notes__", ()))
        raise ValueError(
            f"the loss runs once, but not twice in a row ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"{notes}"
        ) from error
    refuse_learnable(others.values(), roots, [record.label for record in rehearsal.of(Kind.WRITTEN)])
    return RehearsedStep(rehearsal, rehearsal.results[0], tuple(sources.found), seen[1])
