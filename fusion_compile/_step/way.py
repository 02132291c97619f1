"""Which way a step is captured: by reading its bytecode, or by running it; and what neither can capture."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fusion_compile._capture.rehearsal.left_behind import Kind, Left
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal

Capture = Literal["read", "run"]
CAPTURES = ("read", "run", None)

_CARRIED = (Kind.STATE, Kind.WRITTEN)
_WHY_NOT = {
    Kind.INITIALISED_ONCE: "is set by the first forward from its inputs, and a program would set it at every step or "
    "never; run the loss once before compile_training_step() (with torch.no_grad(): loss_fn(model, *batch))",
    Kind.DRAWN_ONCE: "is drawn at random by the first forward, and a program would draw it at every step or never; run "
    "the loss once before compile_training_step() (with torch.no_grad(): loss_fn(model, *batch))",
    Kind.NUMBER: "changes at every forward, and a program has it as it was; make it a 0-dim tensor (a buffer counts "
    "with tensor.add_(1)), or change it between the steps, outside of the loss",
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
    to be decided. `carried`: the records of state that the step carries."""

    runs: bool
    because: str
    carried: tuple[Left, ...]


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
    if not carried:
        return Way(asked == "run", "", ())
    names = ", ".join(record.label for record in carried[:3]) + (", …" if len(carried) > 3 else "")
    if asked == "read":
        raise ValueError(
            f"{names} changes at every forward, outside of the model's buffers. A step that is captured by reading "
            f"does not carry it; leave out capture='read', or make it a buffer of the model (register_buffer)."
        )
    return Way(True, f"{names} changes at every forward, outside of the model's buffers", carried)
