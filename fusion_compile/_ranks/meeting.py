"""Ranks agree before anything runs: all go on, or all stop with the same sentence.

A collective that one rank does not take part in holds the others until a timeout, and one that pairs with another is
wrong without a word. So each rank first does alone whatever may fail (checks, a rehearsal, a capture, a compilation, a
first step on stand-ins), and then says what it is about to do. Only then does a step communicate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from torch import fx

from fusion_compile._ranks.alone import Alone, own_collective
from fusion_compile._ranks.channel import Channel, number_of
from fusion_compile._ranks.division import Division
from fusion_compile._ranks.fingerprint import fingerprint
from fusion_compile._ranks.groups import Group, Ranks

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, KeyError, RuntimeError, OSError, FileNotFoundError, FileExistsError)
}
_LATER = (
    "This rank had agreed with the others before that, and they may wait for it. End the processes, and start them "
    "again from a checkpoint."
)
_CUT_OFF = ("onnection", "gloo", "Gloo", "NCCL", "imed out")
"""In what torch says where a collective finds another rank no more."""


class Meeting:
    """What the ranks of one step agree on. All ranks make it together.

    Between two acts it holds neither model nor state, because compiled programs hold it.

    Attributes:
        groups: Those in which the step communicates, by name.
        division: How the state is divided, once that is known.
        expected: How many collectives a program that is captured has; more are the loss's own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.channel = Channel(ranks)
        self.groups: dict[str, Group] = {g.name: g for g in (ranks.everyone, ranks.shards)}
        self.division: Division | None = None
        self.expected: int | None = None
        self._facts: dict[str, Any] = {}
        self._writes: tuple[int, Callable[[], dict[str, int]]] = 0, dict
        self._act, self._met, self._alone, self._inside = "", False, False, False
        self._agreed, self._meetings = False, 0

    @property
    def met(self) -> bool:
        """Whether the ranks have met in what this one does now."""
        return self._met

    @contextlib.contextmanager
    def about_to(
        self, act: str, facts: Mapping[str, Any], writes: int = 0, weights: Callable[[], dict[str, int]] = dict
    ) -> Iterator[None]:
        """Inside, this rank does `act` (``"takes a step"``). What it raises before the ranks have met, all raise.

        `facts`: in what ranks must agree, plain values by name. `writes`: how often somebody wrote weights on this rank
        since the last act; where any rank has some, all compare `weights()`, numbers that stand for their contents.
        """
        if self._inside:  # a part of a larger act
            yield
            return
        self._act, self._facts, self._met, self._inside = act, dict(facts), False, True
        self._agreed = False
        self._writes = writes, weights
        try:
            yield
        except Exception as error:
            if not self._met:
                self._stop(error)
            if self._agreed:
                error.add_note(_LATER)
                word = self.channel.leave_word(self._meetings, f"{type(error).__name__}: {error}")
                if word and isinstance(error, RuntimeError) and any(cut in str(error) for cut in _CUT_OFF):
                    raise RuntimeError(
                        f"{word}, and this rank waited for it in the middle of an act. {_LATER}"
                    ) from error
            raise
        finally:
            self._inside, self._writes = False, (0, dict)

    def knows(self, division: Division) -> None:
        """The state is divided so."""
        self.division = division
        groups = [g for share in division.shares.values() for g in (share.inner, share.outer) if g is not None]
        self.groups |= {group.name: group for group in groups}

    def meet(self, what: object = "", *, again: bool = False, **facts: Any) -> None:
        """Go on if all ranks are about to do the same. `what`: what they compute together, such as the collectives of
        a program. `again`: there will be another meeting in this act. `facts`: further ones.

        Raises, on all ranks and with the same sentence, what the first rank says that refuses, or ValueError naming in
        what they differ.
        """
        if self._alone:
            return
        if self._met:
            raise RuntimeError(f"a rank that {self._act} would meet the others twice; please report this.")
        self._facts |= {**facts, "what": what}
        (writes, weights), self._writes = self._writes, (0, dict)
        self._met = True  # what fails from here on, the others know
        same, wrote = self._all_say(writes)
        if same and wrote:
            self._facts["weights"] = weights()
            same, _ = self._all_say()
        if not same:
            self._hear(None)
        self._met, self._agreed = not again, True
        self._meetings += 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, programs send nothing and meet nobody: see `Alone`."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def meets(self, what: object) -> contextlib.AbstractContextManager[object]:
        """Around each run of a program that communicates `what`: its ranks have met, or it sends nothing."""
        if self._alone:
            return Alone(self.groups)
        self.meet(what)
        return contextlib.nullcontext()

    def _all_say(self, writes: int = 0) -> tuple[bool, int]:
        try:
            return self.channel.all_say([number_of(self._act), number_of(self._facts)], writes)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.channel.rank} {self._act}, and another rank does not come: it has ended, or waits "
                f"elsewhere. Every rank takes as many steps (DistributedSampler(drop_last=True)) and calls save, load "
                f"and state_dict alike. torch says: {error}"
            ) from error

    def _stop(self, error: Exception) -> NoReturn:
        """Raise `error` on all ranks, of which the others are on their way to a meeting."""
        try:
            self.channel.all_say([-1, -1])
        except RuntimeError:  # nobody is left to hear it
            raise error from error.__cause__
        self._hear(error)
        raise error

    def _hear(self, error: Exception | None) -> None:
        """Say what there is to say, hear the others, and raise what all raise."""
        kind = None if error is None else next((k for k in type(error).__mro__ if k.__name__ in _KINDS), RuntimeError)
        said = None if error is None or kind is None else (kind.__name__, str(error))
        self._met = True
        heard = self.channel.everyone_says((self._act, said, self._facts))
        refusals = [refusal for _, refusal, _ in heard]
        if error is not None and all(refusal == said for refusal in refusals):
            return  # the same everywhere: it needs no word about ranks
        for rank, refusal in enumerate(refusals):
            if refusal is not None:
                name, sentence = refusal
                raise _KINDS[name](f"rank {rank} of {len(heard)} refuses, and no rank goes on: {sentence}") from error
        raise ValueError(_difference([act for act, *_ in heard], [facts for *_, facts in heard]))


class AtEachRun:
    """What is around each run of one program. `what`: what it communicates; see ``fingerprint``."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.what: tuple[str, ...] = ()

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        return self.meeting.meets(self.what)

    def of(self, graph: fx.GraphModule, more: int = 0) -> AtEachRun:
        """This, of a program with that graph. Raises ValueError if the loss communicates itself. `more`: collectives
        that were added to it."""
        self.what = fingerprint(graph, self.meeting.groups)
        if self.meeting.expected not in (None, len(self.what) - more):
            raise ValueError(own_collective(f"{len(self.what)} collectives instead of {self.meeting.expected}"))
        return self


def _difference(acts: list[str], facts: list[Mapping[str, Any]]) -> str:
    """In words, the first thing in which ranks differ."""
    if (other := _first_other(acts)) is not None:
        return (
            f"rank 0 {acts[0]} while rank {other} {acts[other]}, so no rank does either. Every rank calls the same "
            f"methods of a step in the same order (step(...), save, load, state_dict), and has as many "
            f"batches: DistributedSampler(drop_last=True)."
        )
    for name in facts[0]:
        values = [each.get(name) for each in facts]
        if (other := _first_other(values)) is not None:
            return _SENTENCES.get(name, _plain)(name, values[0], values[other], other)
    return "the ranks do not agree, and cannot say in what; please report this."


def _first_other(values: list[Any]) -> int | None:
    return next((rank for rank, value in enumerate(values) if repr(value) != repr(values[0])), None)


def _plain(name: str, here: Any, there: Any, rank: int) -> str:
    return (
        f"{name} is {here} on rank 0 and {there} on rank {rank}; nothing was changed. Make it the same on every rank."
    )


def _of_numbers(name: str, here: Any, there: Any, rank: int) -> str:
    odd = next((n for n in here if repr(here[n]) != repr(there.get(n))), next(iter(here), ""))
    return (
        f"hyperparameter {odd!r} is {here.get(odd)} on rank 0 and {there.get(odd)} on rank {rank}, so no step was "
        f"taken. Set it, or its schedule, on every rank."
    )


def _of_steps(name: str, here: Any, there: Any, rank: int) -> str:
    return (
        f"rank 0 has taken {here} steps and rank {rank} {there}, so no step was taken. Every rank takes as many steps, "
        f"and loads the same checkpoint."
    )


def _of_programs(name: str, here: Any, there: Any, rank: int) -> str:
    mine, theirs = _parted(here, there)
    return (
        f"the ranks would run different programs, so none ran: rank 0 {mine}, rank {rank} {theirs}. The loss must "
        f"return the same metrics, and change the same buffers, on every rank."
    )


def _parted(here: Any, there: Any) -> tuple[str, str]:
    if not (isinstance(here, tuple) and isinstance(there, tuple)):
        return f"does {here}", f"does {there}"
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return tuple(f"sends {side[at]}" if at < len(side) else "sends nothing more" for side in (here, there))  # type: ignore[return-value]


def _of_weights(name: str, here: Any, there: Any, rank: int) -> str:
    odd = next((n for n in here if here[n] != there.get(n)), "")
    return (
        f"somebody wrote {odd} between steps, and it is another on rank {rank} than on rank 0, so no step was taken. "
        f"Write the same on every rank (load on all of them, or torch.distributed.broadcast what one has)."
    )


def _of_entries(name: str, here: Any, there: Any, rank: int) -> str:
    odd = next((n for n in {**here, **there} if repr(here.get(n)) != repr(there.get(n))), "")
    what = "the model has" if name == "model" else "the step was given"
    return (
        f"the ranks made different steps: {what} {odd} {here.get(odd, 'nowhere')} on rank 0 and "
        f"{there.get(odd, 'nowhere')} on rank {rank}. Make the same model and the same step on every rank."
    )


_SENTENCES = {
    "model": _of_entries,
    "options": _of_entries,
    "numbers": _of_numbers,
    "steps": _of_steps,
    "what": _of_programs,
    "weights": _of_weights,
}
