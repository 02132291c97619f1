"""Which way a step is captured: by reading its bytecode, or by running it; and what neither can capture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fusion_compile._capture.python_state.slots import MISSING, WHOLE
from fusion_compile._capture.rehearsal.left_behind import Kind, Left
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal
from fusion_compile._capture.sources.sources import Source

Capture = Literal["read", "run"]
CAPTURES = ("read", "run", None)

_CARRIED = (Kind.STATE, Kind.WRITTEN)
_WHY_NOT = {
    Kind.INITIALISED_ONCE: "is set by the first forward from its inputs, and a program would set it at every step or "
    "never; run the loss once before compile_training_step() (with torch.no_grad(): loss_fn(model, *batch))",
    Kind.DRAWN_ONCE: "is drawn at random by the first forward, and a program would draw it at every step or never; run "
    "the loss once before compile_training_step() (with torch.no_grad(): loss_fn(model, *batch))",
    Kind.GROWS: "is longer after every forward, and a program does not make Python lists longer; return what should be "
    "kept as a metric, (loss, {name: tensor})",
    Kind.SHRINKS: "is shorter after every forward, and a program takes nothing out of Python lists; give its items to "
    "the step as part of the batch",
    Kind.MUTATED: "is a numpy array that every forward changes, and a program does not see numpy; keep a tensor there",
    Kind.OTHER: "is not what it was after a forward, and a program does not run Python again; give it to the step as "
    "part of the batch, or change it between the steps, outside of the loss",
}


class Way(NamedTuple):
    """`runs`: whether the step is captured by running. `because`: what decided it, for people; empty where nothing had
    to be decided. `carried`: the records of state that the step carries. `numbers`: those of plain numbers that it
    counts on."""

    runs: bool
    because: str
    carried: tuple[Left, ...]
    numbers: tuple[Left, ...] = ()


def choose(rehearsal: Rehearsal, asked: Capture | None, *, uncompiled: bool) -> Way:
    """How to capture a step whose rehearsal showed this.

    Args:
        rehearsal: What a real run leaves behind.
        asked: `capture` of ``compile_training_step``.
        uncompiled: Whether the step runs as Python at every call (``mode="eager"``), which can do all that Python can.

    Raises:
        ValueError: The loss leaves something behind that no program can, or that the way that was asked for cannot.
    """
    carried = tuple(record for record in rehearsal.left if record.kind in _CARRIED)
    if uncompiled:
        return Way(True, "", carried)
    if odd := [record for record in rehearsal.left if record.kind in _WHY_NOT]:
        first = odd[0]
        others = f" ({len(odd) - 1} more: {', '.join(r.label for r in odd[1:4])})" if len(odd) > 1 else ""
        raise ValueError(f"{first.label} {_WHY_NOT[first.kind]}.{others}")
    numbers = tuple(record for record in rehearsal.left if record.kind is Kind.NUMBER)
    for record in numbers:
        if record.slot is None or record.slot.key is WHOLE or record.before is MISSING:
            raise ValueError(
                f"{record.label} changes at every forward, and a program has it as it was; make it a 0-dim tensor (a "
                f"buffer counts with tensor.add_(1)), or change it between the steps, outside of the loss."
            )
    kept = (*carried, *numbers)
    if not kept:
        return Way(asked == "run", "", ())
    names = ", ".join(record.label for record in kept[:3]) + (", …" if len(kept) > 3 else "")
    if asked == "read":
        raise ValueError(
            f"{names} changes at every forward, outside of the model's buffers. A step that is captured by reading "
            f"does not carry it; leave out capture='read', or make it a buffer of the model (register_buffer)."
        )
    return Way(True, f"{names} changes at every forward, outside of the model's buffers.", carried, numbers)


def refuse_sources(sources: Sequence[Source], because: str) -> None:
    """Raise ValueError if the loss reads what a step that is captured by running would read once and keep for ever.

    `because`: why the step is not captured by reading.
    """
    if sources:
        reading = f" It is not captured by reading, because {because}" if because else ""
        raise ValueError(f"{sources[0].sentence()}{reading}")
