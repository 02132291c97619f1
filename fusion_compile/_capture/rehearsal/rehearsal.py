"""A rehearsal: real runs of the loss before anything is captured, after which everything is as it was.

Two runs, the second from where the first ended, show what a run leaves behind and which of it changes at every run.
Where something is set in the first run alone, one or two more, each from the beginning, show whether a program may
start with it already set: a cache's table may, an initialisation from the first batch may not.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fusion_compile._capture.python_state.slots import write
from fusion_compile._capture.rehearsal._compat import as_bytes
from fusion_compile._capture.rehearsal.contents import Change, Contents
from fusion_compile._capture.rehearsal.left_behind import (
    Inputs,
    Kind,
    Left,
    Runs,
    in_a_cache,
    initialised,
    is_table,
    sort_out,
    tensors_of,
)
from fusion_compile._capture.rehearsal.own_tensors import StandIns
from fusion_compile._capture.rehearsal.provenance import Provenance, Write
from fusion_compile._capture.rehearsal.result_caches import ResultCaches, filled_once, is_filled_from_nothing
from fusion_compile._capture.rehearsal.values import before_run, is_equal, snapshot


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal showed. Everything is as it was before it, apart from `lru_caches` and `not_put_back`.

    Attributes:
        results: What the two runs returned, tensors detached.
        left: What they left behind, one record for each slot, array or tensor.
        drew_random: Whether they drew random numbers, from whatever generator.
        draws: By torch generator, how many operators drew from it, in both runs.
        moved_generators: Labels of the generators whose state the runs changed.
        written_inputs: Writes to the declared inputs.
        lru_caches: How many caches of ``functools.lru_cache`` stay filled, as their results depend on nothing.
        not_put_back: Labels of iterators that gave items to the runs and cannot be set back.
        not_looked_into: Containers too large to be looked into to their ends.
        runs: How many runs were made.
        dtypes: Of everything that they computed.
        handed_out: Labels of caches of ``functools.lru_cache``, filled before, that gave tensors to the first run.
        once: Where the second run failed, what it said, and what the first had changed. `left` then says only what
            holds the model's own tensors, and the second result is the first.
        checks_arguments: Whether ``torch.distributions`` looked at numbers on the CPU to check its arguments.
    """

    results: tuple[Any, Any]
    left: tuple[Left, ...]
    drew_random: bool
    draws: Mapping[str, int]
    moved_generators: tuple[str, ...]
    written_inputs: tuple[Write, ...]
    lru_caches: int
    not_put_back: tuple[str, ...]
    not_looked_into: tuple[str, ...]
    runs: int
    dtypes: frozenset[torch.dtype] = frozenset()
    handed_out: tuple[str, ...] = ()
    once: str = ""
    checks_arguments: bool = False

    def of(self, kind: Kind) -> tuple[Left, ...]:
        """The records of one kind."""
        return tuple(record for record in self.left if record.kind is kind)

    def fill(self) -> None:
        """Put the caches' real values into their slots, and the model's own tensors where runs put them."""
        _fill((*self.of(Kind.CACHE), *self.of(Kind.OWN)))

    def owned(self) -> list[Left]:
        """What a forward leaves holding the model's own parameters or buffers."""
        return [record for record in self.left if record.own]


def rehearse(
    roots: Mapping[str, Any],
    run: Callable[[], Any],
    inputs: Iterable[Tensor] = (),
    weights: Iterable[Tensor] = (),
    originals: Iterable[Tensor] = (),
) -> Rehearsal:
    """Call `run` two to four times for real and put everything back.

    The first and the second call are in a row. The further ones, each from the original state, happen only if the
    first alone set something that depends on nothing; their results must equal the first call's bitwise.

    Cost: the runs, in which each operator takes some 70 µs more, and about 1 ms of bookkeeping for each module, on the
    CPU. Memory: a copy of each tensor that a run writes in place.

    What it cannot tell: what changes at the third run or later (``n % 3``), or with another batch only; a plain value
    that happens to be equal after each run, other than a float that was computed; what lies in C++ or in files.

    Args:
        roots: What user code is reached from, ``{"model": model, "loss_fn": loss_fn}``. Trainable parameters and the
            buffers of roots that are modules count as inputs on which results depend.
        run: Calls the loss on clones of weights, buffers and batch, and its backward if the step has one. It should
            clone the batch, containers included, at each call. It is called several times.
        inputs: The tensors of the batch, any device and dtype. Results depend on them, and writes to them are expected.
        weights: Clones that `run` puts in the place of parameters and buffers; inputs as well. A slot in which a run
            leaves nothing but these holds the model's own.
        originals: For each of `weights` the model's own tensor, for which it stands; none: they stand for nothing.

    Returns:
        What was left behind, sorted.

    Raises:
        Exception: Whatever `run` raises in the first call, after everything was put back.
    """
    with _collections_are_silent():
        return contextvars.copy_context().run(_rehearse, roots, run, list(inputs), list(weights), list(originals))


def run_once(
    roots: Mapping[str, Any],
    run: Callable[[], Any],
    inputs: Iterable[Tensor] = (),
    weights: Iterable[Tensor] = (),
) -> Any:
    """Call `run` once for real and put everything back: what it returned, tensors detached. See `rehearse`."""

    def once() -> Any:
        contents = Contents(roots, {"inputs": list(inputs), "weights": list(weights)})
        owners = contents.reach.generators.values()
        trial = _Trial(contents, Provenance([*inputs, *weights], _weights(roots), owners), run)
        try:
            return trial.go_on()
        finally:
            trial.back_to_start()

    with _collections_are_silent():
        return contextvars.copy_context().run(once)


@contextlib.contextmanager
def _collections_are_silent() -> Iterator[None]:
    """Inside, the garbage collector calls nobody back. What a callback counts or reads (a clock) is not the loss's
    doing, and may happen in the middle of any run."""
    former = list(gc.callbacks)
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:0] = former


def _rehearse(
    roots: Mapping[str, Any],
    run: Callable[[], Any],
    inputs: list[Tensor],
    weights: list[Tensor],
    originals: list[Tensor],
) -> Rehearsal:
    last = {"inputs": inputs, "weights": weights}
    contents = Contents(roots, last)
    provenance = Provenance([*inputs, *weights], _weights(roots), contents.reach.generators.values())
    trial = _Trial(contents, provenance, run)
    caches = ResultCaches(contents.reach.caches.values())
    try:
        first = trial.go_on()
        handed_out = caches.handed_out()
        changed, moved, drew_outside = contents.changes(), contents.moved_generators(), contents.drew_outside_torch()
        between = Contents(roots, last)
        then = ResultCaches(contents.reach.caches.values())
        second, once = _second(trial, first, changed)
        parameters = Inputs(w for w in weights if w.requires_grad)
        again = [] if once else between.changes()
        stand_ins = StandIns(zip(weights, originals, strict=False))
        seen = Runs(contents, between, changed, again, provenance, Inputs(weights), parameters, drew_outside, stand_ins)
        left = sort_out(seen) + [in_a_cache(*one) for one in filled_once(caches, then, provenance)]
        if once:
            left = [replace(record, kind=Kind.OWN) for record in left if record.own]
        moved = list(dict.fromkeys([*moved, *contents.moved_generators()]))
        draws, written = dict(provenance.draws), provenance.written(contents.reach.tensors.values())
        if not drew_outside:
            trial.keep_caches_of_nothing()
        if any(record.kind is Kind.CACHE for record in left):
            left = _proved(trial, left, _Outcome.of(first, changed, between, provenance))
    finally:
        trial.back_to_start()
    return Rehearsal(
        results=(first, second),
        left=tuple(left),
        drew_random=bool(moved) or bool(draws),
        draws=draws,
        moved_generators=tuple(moved),
        written_inputs=tuple(write for write in written if write.declared),
        handed_out=tuple(handed_out),
        once=once,
        checks_arguments=provenance.checks_arguments,
        lru_caches=len(trial.filled),
        not_put_back=tuple(contents.not_put_back()),
        not_looked_into=tuple(contents.reach.cut),
        runs=provenance.run,
        dtypes=frozenset(provenance.dtypes),
    )


def _second(trial: _Trial, first: Any, changed: list[Change]) -> tuple[Any, str]:
    """The second run's result. Where it alone fails, the first's, and what to say of it."""
    try:
        return trial.go_on(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: the loss succeeded before
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        named = ", ".join(change.label for change in changed[:5])
        return first, said + (f"; the first run had changed {named}" if named else "")


class _Trial:
    """Runs from one beginning, as often as wanted."""

    def __init__(self, contents: Contents, provenance: Provenance, run: Callable[[], Any]) -> None:
        self.contents = contents
        self.provenance = provenance
        self.filled: list[Any] = []
        """Caches of ``functools.lru_cache`` whose results depend on nothing."""
        self._run = run

    def go_on(self) -> Any:
        """One run from where things stand. A copy of the result."""
        self.provenance.next_run()
        with torch.compiler.set_stance("force_eager"), self.provenance:
            return snapshot(self._run())

    def back_to_start(self) -> None:
        """Put everything back."""
        self.contents.restore(keep_caches=self.filled)
        self.provenance.put_back()

    def keep_caches_of_nothing(self) -> None:
        """Let those caches stay filled. They cannot be filled later: only a call fills them."""
        for cache in self.contents.filled_caches():
            if is_filled_from_nothing(cache, self.provenance):
                self.filled.append(cache)


class _Outcome(NamedTuple):
    """How one run ended: its result, what it left in slots and in memory, and where the random numbers stood."""

    result: Any
    slots: dict[Any, Any]
    memory: dict[StorageWeakRef, torch.UntypedStorage]
    between: Contents

    @classmethod
    def of(cls, result: Any, changes: list[Change], between: Contents, provenance: Provenance) -> _Outcome:
        """The outcome of the first run, from what was seen up to the end of the second."""
        slots = {c.slot.identity: before_run(provenance, 2, c.after) for c in changes if c.slot is not None}
        return cls(result, slots, provenance.memory_after(1), between)


def _proved(trial: _Trial, left: list[Left], outcome: _Outcome) -> list[Left]:
    """Keep the kind of those caches with which a run may start; the others become initialisations."""
    caches = [record for record in left if record.kind is Kind.CACHE]
    tables = [record for record in caches if is_table(record)]
    proved: list[Left] = []
    for attempt in [caches, tables] if 0 < len(tables) < len(caches) else [caches]:
        if _starts_alike(trial, attempt, outcome):
            proved = attempt
            break
    return [r if r.kind is not Kind.CACHE or any(r is p for p in proved) else initialised(r) for r in left]


def _starts_alike(trial: _Trial, caches: list[Left], outcome: _Outcome) -> bool:
    """Whether a run from the beginning with `caches` filled ends as the first run did: with the same result, the same
    values in all other slots, the same bytes in memory and the same states of all generators."""
    trial.back_to_start()
    _fill(caches)
    try:
        result = trial.go_on()
    except Exception:
        return False
    filled = {record.slot.identity for record in caches if record.slot is not None}
    now = {c.slot.identity: c.after for c in trial.contents.changes() if c.slot is not None}
    mine, first = ({k: v for k, v in slots.items() if k not in filled} for slots in (now, outcome.slots))
    memory = trial.provenance.memory_after(trial.provenance.run)
    if any(trial.provenance.run in trial.provenance.runs_that_wrote(t) for c in caches for t in tensors_of(c)):
        return False
    return (
        is_equal(result, outcome.result)
        and mine.keys() == first.keys()
        and all(is_equal(mine[k], first[k], opaque_are_equal=True) for k in mine)
        and all(_has_same_bytes(memory[k], copy) for k, copy in outcome.memory.items() if k in memory)
        and not outcome.between.moved_generators()
    )


def _has_same_bytes(a: torch.UntypedStorage, b: torch.UntypedStorage) -> bool:
    return a.nbytes() == b.nbytes() and torch.equal(*(as_bytes(memory) for memory in (a, b)))


def _fill(records: Iterable[Left]) -> None:
    for record in records:
        if record.slot is not None:
            write(record.slot, record.kept)


def _weights(roots: Mapping[str, Any]) -> list[Tensor]:
    modules = [root for root in roots.values() if isinstance(root, nn.Module)]
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    return weights + [buffer for module in modules for buffer in module.buffers()]
