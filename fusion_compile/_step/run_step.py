"""A step that runs user code: once, to be captured, with the checks that running owes; or at every call, uncaptured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fusion_compile._capture.by_running.trace import no_checkpoint_is_reentrant
from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.watch.reads import Reads
from fusion_compile._capture.watch.watch import Watch
from fusion_compile._program.memory.schedule import written_into
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._program.shared_regions import SharedRegions
from fusion_compile._ranks.meeting import AtEachRun
from fusion_compile._step.by_running import CapturedStep
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_values import PartOf
from fusion_compile._step.counted import CountedNumbers
from fusion_compile._step.metrics import fit_metrics
from fusion_compile._step.update import UpdatePlan, donated
from fusion_compile._types import Tensors


class Step(Protocol):
    """One way to take a step for one kind of batch. `shows`: the loss's metrics that it has."""

    shows: frozenset[str]

    @property
    def compiler_draws(self) -> bool:
        """Whether a compiler has written what draws its random numbers, which may then be other ones."""
        ...

    @property
    def forms(self) -> dict[str, Any]: ...

    @property
    def counted(self) -> list[Slot]: ...

    def fits(self, state: Tensors, batch: tuple[Any, ...]) -> bool: ...

    def __call__(self, state: Tensors, batch: tuple[Any, ...]) -> Tensors: ...

    def done(self) -> None: ...


class UncapturedStep:
    """The pure step itself, for ``mode="eager"``: Python runs at every call, and does what it does.

    Attributes:
        counted: Where the plain numbers lie that Python changes.
    """

    def __init__(
        self,
        advance: Callable[..., Tensors],
        carried: Carried,
        counted: list[Slot],
        update: UpdatePlan | None = None,
    ) -> None:
        def fitting(state: Tensors, *batch: Any) -> Tensors:
            new = advance(state, *batch)
            if update is not None:
                fit_metrics(update, state, new)
            return new

        self._step, self._carried, self.counted = donated(fitting), carried, counted
        self.shows: frozenset[str] = frozenset()

    @property
    def forms(self) -> dict[str, Any]:
        """How user code held its state after the last call."""
        return self._carried.forms

    @property
    def compiler_draws(self) -> bool:
        """False: nothing was compiled."""
        return False

    def fits(self, state: Tensors, batch: tuple[Any, ...]) -> bool:
        """True: nothing was captured."""
        return True

    def done(self) -> None:
        """Nothing is left to do: Python ran."""

    def __call__(self, state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        """Take one step in place; returns the entries that the state does not have yet."""
        with no_checkpoint_is_reentrant():
            return self._step(state, batch)


class RunStep:
    """A step captured by running it.

    Nothing guards what Python decided while it ran, so a watch compares it before each call. Plain numbers that the
    loss changes are counted on.

    Attributes:
        program: What was captured.
        forms: How user code holds its state after the step.
        meets: With ranks, what is around each run: their meeting.
    """

    def __init__(self, captured: CapturedStep, forms: dict[str, Any], numbers: CountedNumbers) -> None:
        self._captured, self._numbers = captured, numbers
        self._watch: Watch | None = None
        self.forms = forms
        self.shows: frozenset[str] = frozenset()
        self.meets: AtEachRun | None = None
        self.program = Program(captured.graph, captured_by="run")
        refuse_host_syncs(self.program.findings(thorough=False), on_cpu=not captured.is_cuda)

    def compile(
        self, state: Tensors, batch: tuple[Any, ...], mode: str, backend: str, shared: SharedRegions | None
    ) -> None:
        """Compile what was captured, as one, or in regions with those of `shared`. Runs nothing. Raises ValueError if
        the compiler does not take it."""
        given = self._numbers.given(batch)
        self.program.schedule.forget()
        with written_into(self.program.schedule):
            self._captured.compile(state, given, mode=mode, backend=backend, shared=shared)
        self.program.compiled[:] = self._captured.regions

    @property
    def compiler_draws(self) -> bool:
        """Between regions, torch's own operators draw."""
        return not self.program.compiled

    @property
    def has_graph(self) -> bool:
        """Whether the captured graph may answer for the compiled step where that is not the ordinary loop's. In regions
        it is put together by this package, and must be the loop's itself."""
        return not self.program.compiled

    @property
    def counted(self) -> list[Slot]:
        """Where the numbers lie that it counts on."""
        return self._numbers.counted

    def watch(self, roots: Mapping[str, Any], reads: Reads, carried: Carried) -> None:
        """From now on notice what changes, apart from what the step itself carries and counts."""
        self._watch = Watch(roots, reads, self._captured.constants)
        around = [slot.holder.slot for slot in self.counted if isinstance(slot.holder, PartOf)]
        self._watch.except_([*carried.slots(), *self.counted, *around])

    def fits(self, state: Tensors, batch: tuple[Any, ...]) -> bool:
        """Whether numbers and sizes are such that this is the step."""
        return self._numbers.fit() and self._captured.fits(state, batch)

    def __call__(self, state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        """Take one step in place; returns the entries that the state does not have yet.

        Raises RuntimeError if something that decided how the step was captured has changed; nothing has happened then.
        """
        if self._watch is not None and (change := self._watch.changed()) is not None:
            raise RuntimeError(change.sentence("step.recapture()"))
        with contextlib.nullcontext() if self.meets is None else self.meets():
            return self._captured(state, self._numbers.given(batch))

    def uncompiled(self, state: Tensors, batch: tuple[Any, ...]) -> None:
        """Take one step in place, operator by operator."""
        with contextlib.nullcontext() if self.meets is None else self.meets():
            self._captured.uncompiled(state, self._numbers.given(batch))

    def done(self) -> None:
        """The step counts: plain numbers go on."""
        self._numbers.count_on()
