"""Graph breaks: where Dynamo stopped tracing, and why in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_compile.explain._facts import GraphBreak
from fusion_compile.explain._run.break_reasons import Words, is_consequence, plain_words
from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.stacks import Frame, stack_frames, users_line
from fusion_compile.passes import Finding
from fusion_compile.passes._user_frame import is_ours, is_the_users


@dataclass(frozen=True)
class Break:
    """One break as torch reports it.

    `what`: torch's name for the kind of break. `context`: torch's debug context. `frames`: outermost first, torch's own
    included.
    """

    what: str
    explanation: str
    hints: tuple[str, ...]
    context: str
    frames: tuple[Frame, ...]

    @property
    def user_frames(self) -> tuple[Frame, ...]:
        """The user's frames below the call by which `explain` ran the program."""
        inside = 1 + max((i for i, (path, *_) in enumerate(self.frames) if is_ours(path)), default=-1)
        return tuple(f for f in self.frames[inside:] if is_the_users(f[0]))

    @property
    def where(self) -> str:
        """``file:line`` of the user's innermost frame, or ""."""
        return users_line(self.user_frames)


def read_breaks(records: Sequence[TraceRecord]) -> tuple[Break, ...]:
    """Read the breaks in `records`. Dynamo meets the same break again in each compilation; keep it once."""
    found = [read_break(r.payload) for r in records if r.kind == "dynamo_graph_break_reason"]
    return tuple({(b.where or b.frames, b.what, b.context): b for b in reversed(found)}.values())[::-1]


def read_break(text: str) -> Break:
    """Read one break from Dynamo's log, or from its exception's message with a ``User code traceback:`` below."""
    reason, _, stack = text.partition("User code traceback:")
    stack = stack.partition("\nTraceback (most recent call last)")[0]
    reason = reason.partition("Graph Break Reason:")[2] or reason
    said, _, after = reason.partition("\n  Explanation:")
    what = said.strip().splitlines()[-1].strip() if said.strip() else "unknown"
    body, _, context = after.partition("Developer debug context:")
    explanation, *hints = body.split("\n  Hint:")
    return Break(
        what,
        _line(explanation),
        tuple(_line(hint) for hint in hints),
        _line(context.partition("\n\n")[0]),
        stack_frames(stack),
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def graph_break(found: Break) -> GraphBreak:
    return GraphBreak(
        f"{_words(found).why} ({found.what})",
        found.where,
        tuple(f"{path}:{line}: {source}" for path, line, source in found.user_frames),
    )


def break_findings(breaks: Sequence[Break]) -> list[Finding]:
    """Return a finding for each break, except breaks that only follow from another one."""
    causes = [b for b in breaks if not is_consequence(b.what)] or breaks
    return [_finding(b) for b in causes]


def _finding(found: Break) -> Finding:
    words = _words(found)
    return Finding(words.kind, words.op, found.where, f"{words.why} The graph breaks there.", words.remedy)


def _words(found: Break) -> Words:
    return plain_words(
        found.what, found.context, found.explanation, found.hints, tuple(path for path, *_ in found.frames)
    )
