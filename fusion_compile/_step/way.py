"""Which way a step is captured: by reading its bytecode, or by running it; and what neither can capture."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import nn

from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot
from fusion_compile._capture.rehearsal.left_behind import IN_A_CACHE, Kind, Left
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal
from fusion_compile._capture.sources.sources import Source
from fusion_compile._step.carried_values import changing_numbers
from fusion_compile._step.shapes import MAX_PROGRAMS

Capture = Literal["read", "run"]
CAPTURES = ("read", "run", None)

_CARRIED = (Kind.STATE, Kind.WRITTEN)
_ONCE = {
    Kind.INITIALISED_ONCE: "is set by the first forward from its inputs",
    Kind.DRAWN_ONCE: "is drawn at random by the first forward",
}
_ONCE_AGAIN = (
    "after it was set already, and a program would set it at every step or never; set it before "
    "compile_training_step(), or keep it in a buffer of the model"
)
_WHY_NOT = {
    Kind.GROWS: "is longer after every forward, and a program does not make Python lists longer; return what should be "
    "kept as a metric, (loss, {name: tensor})",
    Kind.SHRINKS: "is shorter after every forward, and a program takes nothing out of Python lists; give its items to "
    "the step as part of the batch",
    Kind.MUTATED: "is a numpy array that every forward changes, and a program does not see numpy; keep a tensor there",
    Kind.OTHER: "is not what it was after a forward, and a program does not run Python again; give it to the step as "
    "part of the batch, or change it between the steps, outside of the loss",
}


class Way(NamedTuple):
    """How a step is captured.

    Attributes:
        runs: Whether it is captured by running.
        because: What decided it, for people; empty where nothing had to be decided.
        carried: The records of state that the step carries.
        numbers: Those of plain numbers that it counts on.
        not_yet: Why this one step runs uncaptured, for people; empty where it is captured.
    """

    runs: bool
    because: str
    carried: tuple[Left, ...]
    numbers: tuple[Left, ...] = ()
    not_yet: str = ""


class Asked(NamedTuple):
    """What a step is asked for.

    Attributes:
        capture: `capture` of ``compile_training_step``.
        uncompiled: Whether the step runs as Python at every call (``mode="eager"``), which can do all that Python can.
        may_wait: Whether this step may run uncaptured, so that the next is captured without its initialisation.
        hooked: Names of parameters that have gradient hooks, which reading does not see.
        tagged: Names of parameters on which user code has put attributes, which reading does not see either.
        carries: Labels of the state that the step carries already.
        kept_outside: Names of parameters and buffers that the loss reads where it keeps them outside of the model.
            Reading would take them for other tensors, without a gradient.
        accumulated: Whether another backward than the step's own adds to ``.grad``, which reading does not see.
    """

    capture: Capture | None
    uncompiled: bool = False
    may_wait: bool = False
    hooked: Sequence[str] = ()
    tagged: Sequence[str] = ()
    carries: Collection[str] = ()
    kept_outside: Sequence[str] = ()
    accumulated: bool = False


def choose(rehearsal: Rehearsal, asked: Asked) -> Way:
    """How to capture a step whose rehearsal showed this.

    Raises:
        ValueError: The loss leaves something behind that no program can, or that the way that was asked for cannot.
    """
    refuse_iterators(rehearsal.not_put_back)
    left = [r for r in rehearsal.left if r.kind not in _ONCE or r.label not in asked.carries]
    carried = tuple(r for r in rehearsal.left if r.kind in _CARRIED)
    numbers = counted(left)
    if asked.uncompiled:
        return Way(True, "", carried, numbers)
    if rehearsal.once:
        said = f"the loss does not run twice in a row from here, which is needed to prove a program ({rehearsal.once})"
        return Way(True, "", carried, numbers, said)
    if odd := [record for record in left if record.kind in _WHY_NOT]:
        raise ValueError(f"{odd[0].label} {_WHY_NOT[odd[0].kind]}.{_others(odd)}")
    if cached := [record for record in left if record.where == IN_A_CACHE]:
        raise ValueError(
            f"{cached[0].label} {_ONCE[cached[0].kind]}, and functools.lru_cache keeps it for all later ones, which a "
            f"program would not; compute it before compile_training_step() and keep it in an attribute or a buffer."
            f"{_others(cached)}"
        )
    once = [(r, _ONCE[r.kind]) for r in left if r.kind in _ONCE]
    once += [(r, "is made by the first forward") for r in numbers if _is_made(r)]
    if once:
        first, why = once[0]
        if not asked.may_wait:
            raise ValueError(f"{first.label} {why} {_ONCE_AGAIN}.{_others([r for r, _ in once])}")
        return Way(True, "", carried, numbers, f"{first.label} {why}")
    for record in numbers:
        if record.slot is None or record.slot.key is WHOLE:
            raise ValueError(
                f"{record.label} changes at every forward, and a program has it as it was; make it a 0-dim tensor (a "
                f"buffer counts with tensor.add_(1)), or change it between the steps, outside of the loss."
            )
    reasons = list(_not_for_reading(rehearsal, asked, (*carried, *numbers)))
    if not reasons:
        return Way(asked.capture == "run", "", ())
    because = ", and ".join(reason for reason, _ in reasons)
    if asked.capture == "read":
        raise ValueError(
            f"{because}. A step that is captured by reading does not carry that on; leave out capture='read', or "
            f"{reasons[0][1]}."
        )
    return Way(True, because, carried, numbers)


class Grown:
    """How often buffers were of another size after a step, and tables were filled for another kind of batch."""

    def __init__(self) -> None:
        self._count = self._refills = 0

    def refilled(self, rehearsal: Rehearsal) -> bool:
        """Whether a rehearsal filled a table (of positions, which grows with a new length), and not too often yet: the
        programs that read the old one are then captured again."""
        filled = bool(rehearsal.of(Kind.CACHE)) and self._refills < MAX_PROGRAMS
        self._refills += filled
        return filled

    def waits(self, way: Way, reshaped: Sequence[str]) -> Way:
        """`way`, or that this step runs uncaptured, where the forward makes buffers of another size: `reshaped`.

        Raises ValueError where that has happened too often.
        """
        if not reshaped:
            return way
        if self._count >= MAX_PROGRAMS:
            raise ValueError(
                f"{reshaped[0]} is of another size after the forward, for the {self._count + 1}th time, and a program "
                f"has buffers of one size. Make it as large as it will be before compile_training_step(), or take "
                f"mode='eager'."
            )
        self._count += 1
        return way._replace(runs=True, not_yet=f"{reshaped[0]} is of another size after the forward")


def counted(left: Sequence[Left]) -> tuple[Left, ...]:
    """The records of plain numbers; for those that lie in a tuple or another container, one for each number."""
    found: list[Left] = []
    for record in left:
        if record.kind not in (Kind.NUMBER, Kind.STATE):
            continue
        inside: list[Slot] = []
        if record.slot is not None and record.slot.key is not WHOLE:
            inside = changing_numbers(record.slot, (record.before, record.after_first, record.after_second))
        found += [replace(record, label=slot.label, slot=slot, kind=Kind.NUMBER) for slot in inside]
        if not inside and record.kind is Kind.NUMBER:
            found.append(record)
    return tuple(found)


def _not_for_reading(rehearsal: Rehearsal, asked: Asked, kept: Sequence[Left]) -> Iterator[tuple[str, str]]:
    """What a step that is captured by reading would lose, and what else people can do about it."""
    if kept:
        names = ", ".join(record.label for record in kept[:3]) + (", …" if len(kept) > 3 else "")
        verb = "changes" if len(kept) == 1 else "change"
        said = f"{names} {verb} at every forward, outside of the model's buffers"
        yield said, "make it a buffer of the model (register_buffer)"
    if asked.hooked:
        yield f"{asked.hooked[0]} has a gradient hook (register_hook)", "remove the hook"
    if asked.tagged:
        said = f"{asked.tagged[0]} carries attributes of its own, which the loss may read"
        yield said, "keep the attributes in a dictionary by name"
    if owned := rehearsal.owned():
        said = f"{owned[0].label} is given the model's own parameters or buffers by the forward"
        yield said, "put them there before compile_training_step()"
    if asked.kept_outside:
        said = f"the loss reads {asked.kept_outside[0]} where it is kept outside of the model"
        yield said, "take it from the model that the loss is given"
    if asked.accumulated:
        said = "a backward inside of the loss, or of a custom function's backward, adds to the parameters' .grad"
        yield said, "take that gradient with torch.autograd.grad"
    if rehearsal.handed_out and not kept:
        said = f"{rehearsal.handed_out[0]}(…) gives out a tensor that functools.lru_cache keeps"
        yield f"{said}, and Dynamo would compute it anew", "keep the tensor in an attribute"


def _is_made(record: Left) -> bool:
    return record.before is MISSING and record.slot is not None and record.slot.key is not WHOLE


def _others(records: Sequence[Left]) -> str:
    return f" ({len(records) - 1} more: {', '.join(r.label for r in records[1:4])})" if len(records) > 1 else ""


def refuse_iterators(moved: Sequence[str]) -> None:
    """Raise ValueError if a look at the loss moved iterators on, whose labels are given, that cannot be set back."""
    if moved:
        raise ValueError(
            f"{moved[0]} gives other items at every forward and cannot be set back; give what it yields to the step as "
            f"part of the batch."
        )


def tagged(model: nn.Module) -> list[str]:
    """Names of the parameters that carry public attributes (``p.lr_scale = 2.0``)."""
    return [
        name
        for name, parameter in model.named_parameters()
        if any(not attribute.startswith("_") for attribute in vars(parameter))
    ]


def refuse_unread(because: str, capture: Capture | None, rehearsal: Rehearsal | None) -> None:
    """Raise ValueError if a step that cannot be captured by reading cannot be captured by running either: nobody asked
    for that, or nothing was rehearsed. `because`: why it cannot be read."""
    if capture == "read":
        unchecked = rehearsal is not None and rehearsal.checks_arguments
        advice = " torch.distributions checks its arguments there: validate_args=False" if unchecked else ""
        raise ValueError(f"the step cannot be captured by reading: {because}.{advice}")
    if rehearsal is None:
        raise ValueError(f"{because} Without rehearse=False the step could be captured by running it.")


def refuse_aliases(rehearsal: Rehearsal, because: str) -> None:
    """Raise ValueError if the loss keeps the memory of a parameter, which a captured run would keep as it once was."""
    if aliases := rehearsal.of(Kind.ALIAS):
        reading = f" It is not captured by reading, because {because}" if because else ""
        raise ValueError(
            f"{aliases[0].label} is left holding a parameter's memory (detach() or .data without clone()), which "
            f"follows the parameter in the ordinary loop and would not in a program; keep a clone()."
            f"{_others(aliases)}{reading}"
        )


def refuse_sources(sources: Sequence[Source], because: str) -> None:
    """Raise ValueError if the loss reads what a step that is captured by running would read once and keep for ever.

    `because`: why the step is not captured by reading.
    """
    if sources:
        reading = f" It is not captured by reading, because {because}" if because else ""
        raise ValueError(f"{sources[0].sentence()}{reading}")
