"""A step captured by reading: Dynamo reads its bytecode, and guards that what it read stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._capture.watch.late_hooks import LateHooks
from fusion_compile._capture.watch.reads import Reads
from fusion_compile._capture.watch.watch import Watch
from fusion_compile._program.beside_its_graph import Beside
from fusion_compile._program.lower import NoLongerFits
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._program.programs import GraphRefused, Programs
from fusion_compile._ranks.meeting import AtEachRun
from fusion_compile._step.containers import map_tensors
from fusion_compile._step.host_reads import not_captured_message
from fusion_compile._step.methods import Methods
from fusion_compile._step.proof import Proof
from fusion_compile._step.pure_step import Form
from fusion_compile._step.shapes import Dims, marks
from fusion_compile._step.update import donated
from fusion_compile._types import Tensors

Pure = Callable[[Form], Callable[[Tensors, tuple[Any, ...]], Tensors]]
"""The pure step, written down in one of its forms."""


class NotRead(ValueError):
    """Dynamo could not read the step; the sentence says where. Nothing was compiled or run."""


class ReadStep:
    """A program of `programs`, compiled by its first step, which has been taken when the constructor is done.

    `shows`: the loss's metrics that it has. `beside`: called before the compiled step runs for the first time, where it
    may raise NotRead, and around each run: with ranks, their meeting.

    Raises NotRead, or ValueError for a graph that was refused; the state is then as before.
    """

    forms: ClassVar[dict[str, Any]] = {}
    """A step that is read carries no state that user code keeps."""
    counted: ClassVar[list[Any]] = []
    """Nor does it count plain numbers."""

    def __init__(
        self,
        programs: Programs,
        key: Hashable,
        pure: Pure,
        due: bool,
        given: tuple[Tensors, tuple[Any, ...]],
        mode: str,
        dims: Dims = (),
        beside: Beside | None = None,
    ) -> None:
        self._dims, self._beside = dims, beside
        self._keys = tuple(given[0])
        self.shows: frozenset[str] = frozenset()
        self._programs, self._key, self._mode = programs, key, mode
        self._methods: Methods | None = None
        self._hooks: LateHooks | None = None
        self._around: Watch | None = None
        self._thorough = next(iter(given[0].values())).is_cuda
        try:
            self._compile(pure(Form(due=due)), given)
        except GraphRefused as refusal:
            if not _recomputes_between_backwards(refusal.program):
                raise
            self._compile(pure(Form(due=due, one_backward=True)), given)

    def watch(self, methods: Methods, hooks: LateHooks, around: Watch | None = None) -> None:
        """From now on refuse a method that was replaced and a hook that was registered, which no guard notices.

        `around`: looked at when a guard fails, to name what changed in the user's words.
        """
        self._methods, self._hooks, self._around = methods, hooks, around

    def fits(self, state: Tensors, batch: tuple[Any, ...]) -> bool:
        """True: Dynamo's guards say at the call whether it fits."""
        return True

    def __call__(self, state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        """Take one step in place. Raises RuntimeError, before anything happened, if a method was replaced, a hook was
        registered, or something is another that Dynamo read."""
        if self._methods is not None and self._hooks is not None:
            self._methods.check()
            self._hooks.check()
        known = self._programs.get(self._key)
        assert known is not None
        if len(state) != len(self._keys):  # metrics of other programs have joined, which Dynamo's guards would notice
            state = {key: state[key] for key in self._keys}
        try:
            known(state, batch)
        except NoLongerFits as error:
            change = None if self._around is None else self._around.difference()
            said = str(error) if change is None else change.sentence("step.recapture()")
            raise RuntimeError(said) from error
        return {}

    @property
    def compiler_draws(self) -> bool:
        """True: Dynamo's graph holds the draws, and the backend compiles it."""
        return True

    @property
    def has_graph(self) -> bool:
        """Whether the captured graph can be run uncompiled."""
        return self._beside is not None

    def uncompiled(self, state: Tensors, batch: tuple[Any, ...]) -> None:
        """Take one step in place, operator by operator, if there is a graph."""
        self._programs.run_graph(self._key, state, batch)

    def forget_graph(self) -> None:
        """Keep only what was compiled."""
        self._programs.forget_graph(self._key)

    def done(self) -> None:
        """Nothing is left to do: a step that is read counts nothing."""

    def forget(self) -> None:
        """Drop the program."""
        self._programs.drop(self._key)

    def _compile(self, advance: Callable[..., Tensors], given: tuple[Tensors, tuple[Any, ...]]) -> None:
        state, batch = given
        if self._dims:  # aliases: a mark stays on a tensor
            batch = map_tensors(torch.Tensor.detach, batch)
            _compat.mark_symbolic(marks(batch, self._dims))
        try:
            with _compat.tracing_gradients():
                self._programs.compile(
                    self._key,
                    donated(advance),
                    state,
                    batch,
                    mode=self._mode,
                    what="the training step" + (" for a band of sizes" if self._dims else ""),
                    check=self._check,
                    beside=self._beside,
                    dynamic=bool(self._dims),
                )
        except NotRead:
            raise
        except _compat.UnsupportedByDynamo as error:
            raise NotRead(not_captured_message(_compat.user_frames(error), str(error))) from error
        except _compat.RefusedByCompiler as error:
            raise NotRead(f"the compiler refuses the graph: {_compat.compilers_reason(error)}") from error
        except Exception as error:
            if self._dims and not isinstance(error, GraphRefused):  # with symbols, torch fails in its own ways
                raise NotRead(f"torch fixes a size, {_compat.where_a_size_is_fixed(error)}.") from error
            if reason := _compat.recomputation_refused(error):
                raise NotRead(not_captured_message([], reason)) from error
            if _compat.misses_a_parameter(error):
                raise NotRead(
                    "the loss reads a parameter that it keeps outside of the model (in a closure, in a list), which is "
                    "another tensor when the step is read."
                ) from error
            if _compat.failed_in_dynamo(error):
                raise NotRead(not_captured_message(_compat.user_frames(error), str(error))) from error
            raise

    def _check(self, program: Program) -> None:
        if _recomputes_between_backwards(program):
            raise GraphRefused(
                "the step checkpoints activations and has several backwards, and torch recomputes activations in one "
                "backward only.",
                program,
            )
        # On a GPU a sync in the backward breaks the capture minutes later, so the whole graph is searched at once.
        refuse_host_syncs(program.findings(thorough=self._thorough), on_cpu=not self._thorough)
        if self._beside is not None and isinstance(self._beside.around_each, AtEachRun):
            self._beside.around_each.of(program.graph)


def watch_around(step: ReadStep, roots: Mapping[str, Any], model: nn.Module, reads: Reads | None) -> None:
    """Let `step` notice and name what changes around it. `reads`: what user code read in a real run, if there was
    one."""
    around = None if reads is None else Watch(roots, reads, frozen=())
    step.watch(Methods(() if reads is None else reads.slots, model), LateHooks(roots), around)


def graph_proved(proof: Proof, state: Tensors, run_graph: Callable[[], object], compiled: Callable[[], object]) -> None:
    """Run a captured graph once and put everything back. Raises NotRead if it is not the ordinary loop's.

    A graph that its compiler alone can run, or for which there is no memory, proves nothing.
    """
    del compiled  # it draws other random numbers
    try:
        run_graph()
        objection = proof.objection_when_read(state)
    except Exception:  # of any kind: operators that exist for compilers fail in their own ways
        objection = ""
    finally:
        proof.undo(state)
    if objection:
        raise NotRead(f"when it is read, {objection}")


def _recomputes_between_backwards(program: Program) -> bool:
    return program.checkpoints > 0 and program.backwards > 1
