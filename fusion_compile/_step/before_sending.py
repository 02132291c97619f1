"""What one rank proves and refuses about its step before it meets the others, so that nobody waits for it in vain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

from torch import nn

from fusion_compile._ranks.alone import Quiet
from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state import keys
from fusion_compile._step.across_ranks import Local, reduced, refuse_buffers
from fusion_compile._step.loss import LossFacts
from fusion_compile._step.notices import Notices
from fusion_compile._step.proof import Proof, not_the_loops_uncaptured
from fusion_compile._step.pure_step import StepPlan
from fusion_compile._step.read_step import NotRead, graph_proved
from fusion_compile._types import Tensors


class BeforeSending:
    """Where nothing is captured: called in each step when this rank has its gradient, before it communicates.

    Attributes:
        proof: What the next call must show, if anything.
    """

    def __init__(self, plan: StepPlan, state: Tensors, meeting: Meeting) -> None:
        self._plan, self._state, self._meeting = plan, state, meeting
        self.proof: Proof | None = None

    def __call__(self, local: Local) -> None:
        """Meet the other ranks. Raises ValueError on all of them where one has not what the ordinary loop has."""
        proof, self.proof = self.proof, None
        if proof is not None and (objection := proof.objection(self._as_alone(local))):
            raise ValueError(not_the_loops_uncaptured(objection))
        self._meeting.meet(local.lines())

    def _as_alone(self, local: Local) -> Tensors:
        division, options = self._plan.division, self._plan.options
        assert division is not None
        with self._meeting.alone(), self._meeting.meets(()):
            found = reduced(division, local, options.weigh_by, whole=options.keep_gradients)
        shown = {keys.metrics("loss"): found.loss, keys.metrics("grad_norm"): found.norm}
        return {**self._state, **shown, **{keys.buffers(n): b for n, b in found.buffers.items()}}


def expected_collectives(plan: StepPlan, model: nn.Module, facts: LossFacts) -> int:
    """How many collectives a program of this step has, if the loss has none of its own."""
    assert plan.division is not None
    buffers = any(model.get_buffer(name).is_floating_point() for name in facts.changed_buffers)
    return plan.division.collectives(
        averages=len(plan.options.averages), buffers=buffers, everywhere=plan.options.keep_gradients
    )


def quiet(meeting: Meeting | None, mode: str) -> contextlib.AbstractContextManager[object]:
    """Inside, a loss that is not captured runs for the first time, and may not communicate. The graph of one that is
    captured shows what it sends (`expected_collectives`)."""
    return contextlib.nullcontext() if meeting is None or mode != "eager" else Quiet()  # type: ignore[no-untyped-call]


def refuse_across_ranks(model: nn.Module, found: LossFacts, carried: Collection[str], notices: Notices) -> None:
    """Raise ValueError for what a loss does that would part the ranks; warn of what each rank keeps for itself."""
    refuse_buffers(dict(model.named_buffers()), found.changed_buffers)
    if found.written:
        raise ValueError(
            f"the forward writes the parameter {found.written[0]}, which each rank would do by its own batch, so that "
            f"the ranks' weights would part. Write weights between steps, on every rank alike."
        )
    if carried:
        notices.warn(
            "carried by rank",
            f"the loss keeps {min(carried)} in Python, and each rank keeps its own, as with DistributedDataParallel; "
            f"a checkpoint has rank 0's. Register it as a floating-point buffer to have it averaged over ranks.",
        )


def proved_alone(
    proof: Proof | None,
    state: Tensors,
    meeting: Meeting,
    draws_apart: bool,
    run_graph: Callable[[], object],
    compiled: Callable[[], object],
) -> None:
    """With ranks: run a compiled step once with nothing sent, and put everything back. Raises NotRead if it is not the
    ordinary loop's on this rank. `draws_apart`: it draws other random numbers, and its graph runs in its place."""
    if proof is None:
        return
    with meeting.alone():
        if draws_apart:
            graph_proved(proof, state, run_graph, compiled)
            return
        try:
            compiled()
            objection = proof.objection_when_read(state)
        finally:
            proof.undo(state)
    if objection:
        raise NotRead(f"when it is read, {objection}")
