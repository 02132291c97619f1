"""Recompiles: the assumptions of a compiled program that failed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fusion_compile.explain._facts import Recompile
from fusion_compile.explain._run.changes import changes, told_together
from fusion_compile.explain._run.compilations import COMMENT, Compilation, as_written, place, readable
from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.recompile_reasons import Words, counter_words, plain_words
from fusion_compile.explain._run.stacks import stack_frames, users_line
from fusion_compile.explain._run.use_sites import (
    Callee,
    as_the_callee_names_it,
    counts_itself,
    first_read,
    is_own,
    is_read,
    method_call,
    read_near,
    starred,
)
from fusion_compile.passes import Finding
from fusion_compile.passes._user_frame import is_the_users

_LIMIT = re.compile(r"recompil\w* limit|recompile_limit|cache_size_limit", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """A guard of the compilation `failed` that did not hold and caused the compilation `compile_id`.

    `text`: the guard as the user would write it (``"lr == 0.1"``), or torch's sentence about a tensor.
    `compiled`: the compilation that it caused, if torch told of it. `callee`: the user's function below the wrappers.
    `called`: of a method of torch's (an optimizer's step), the object and the line at which the user calls it.
    """

    text: str
    where: str
    compile_id: str
    failed: Compilation | None
    compiled: Compilation | None = None
    callee: Callee | None = None
    called: tuple[str, str] = ("", "")

    @property
    def words(self) -> Words:
        return plain_words(self.text, self.failed.types if self.failed else {})

    @property
    def follows_from_a_break(self) -> bool:
        """Whether the guard is about a value that Python computed before a graph break, which is the cause then."""
        return "___stack" in self.text

    def in_the_users_words(self, name: str, where: str) -> tuple[str, str]:
        """Return `name` and `where` as they are in the user's own function, if torch tells those of a wrapper."""
        failed = self.failed
        if failed is None or not name:
            return name, where
        if self.called[1] and name.startswith("self."):
            return self.called[0] + name.removeprefix("self"), self.called[1]
        if not starred(failed.file, failed.line, name):
            if is_own(failed.file) and not is_own(where.rpartition(":")[0]):
                where = first_read(failed.file, failed.line, name) or failed.where
            return name, read_near(where, name)[1] if name.endswith("']") else where
        named = "" if self.callee is None else as_the_callee_names_it(name, self.callee, failed.types)
        if self.callee is None or not named:
            return read_near(where, name)
        return named, first_read(self.callee.file, self.callee.line, named) or self.callee.where


def read_failures(
    records: Sequence[TraceRecord],
    compilations: Mapping[str, Compilation],
    *,
    of_these_only: bool,
    callee: Callee | None = None,
) -> tuple[Failure, ...]:
    """Read for each recompile the failed guard of the program compiled last, which is the closest one.

    `of_these_only`: ignore guards of programs that are not in `compilations`; they belong to earlier runs.
    `callee`: the function that runs below all wrappers of the first compiled frame.
    """
    found = []
    for record in records:
        if record.kind == "recompile_reasons":
            failures = [
                _failure(reason, record.compile_id, compilations, callee) for reason in _reasons(record.payload)
            ]
            own = [f for f in failures if f.failed or not of_these_only]
            found += [f for f in own if not f.text.startswith("BACKEND_MATCH")][:1]
    return tuple(found)


def _reasons(payload: str) -> list[str]:
    """Read the reasons: torch writes several as a JSON list, and a single one as plain text."""
    try:
        read = json.loads(payload)
    except ValueError:
        return [payload]
    return [str(r) for r in read] if isinstance(read, list) else [str(read)]


def _failure(
    reason: str, compile_id: str, compilations: Mapping[str, Compilation], callee: Callee | None = None
) -> Failure:
    head, _, stack = reason.partition("\nUser stack trace:")
    label = re.match(r"(\d+/\d+): ", head)
    failed = compilations.get(label[1]) if label else None
    head = head[label.end() :] if label else head
    comment = COMMENT.search(head)
    text = as_written(head[: comment.start()] if comment else head)
    where = users_line(stack_frames(stack))
    if not where and comment:
        where = place(comment["file"], comment["line"], {failed.file} if failed else set())
    if failed is None:
        return Failure(text, where, compile_id, None)
    outermost = failed.compile_id.partition("/")[0] == next(iter(compilations)).partition("/")[0]
    called = ("", "") if where or is_the_users(failed.file) else _where_it_is_called(failed.function, compilations)
    own = callee if outermost else None
    found = Failure(text, where, compile_id, failed, compilations.get(compile_id), own, called)
    name = _value(found.words.op)
    named, place_of_it = found.in_the_users_words(name, where or first_use(name, failed))
    return replace(found, text=text.replace(name, named) if name else text, where=place_of_it)


def _where_it_is_called(method: str, compilations: Mapping[str, Compilation]) -> tuple[str, str]:
    """The object and the line of the first call of `method` in a function of the user's that was compiled."""
    for compilation in compilations.values():
        if is_the_users(compilation.file):
            found = method_call(compilation.file, compilation.line, method)
            if found[1]:
                return found
    return "", ""


def _value(op: str) -> str:
    """``"x"`` of ``x.shape[0]``."""
    return op.partition(".shape[")[0]


def first_use(name: str, compilation: Compilation) -> str:
    """Return the line of the first guard that reads `name`, or the first line of the compiled function; "" if it is
    torch's."""
    guards = (g.where for g in compilation.guards if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", g.text))
    return next(guards, "") or (compilation.where if is_the_users(compilation.file) else "")


def recompile(failure: Failure, compilations: Mapping[str, Compilation]) -> Recompile:
    compiled = compilations.get(failure.compile_id) or failure.failed
    return Recompile(compiled.function if compiled else "", readable(failure.text), failure.where, failure.compile_id)


def recompile_findings(failures: Sequence[Failure]) -> list[Finding]:
    """Return findings for each recompile: the guard that torch names, and what else changed with it."""
    return [finding for failure in failures for finding in _findings(failure)]


def _findings(failure: Failure) -> list[Finding]:
    first, *others = [(failure.where, failure.words), *_changed_with_it(failure)]
    if failure.words.kind in ("dynamic_shape", "python_scalar") and any(first[1].op in w.op for _, w in others):
        told = others  # they say the same of the first, and more
    else:
        told = [first, *others]
    return [Finding(w.kind, w.op, where, w.why, w.remedy) for where, w in (_counted(*each) for each in told)]


def _changed_with_it(failure: Failure) -> list[tuple[str, Words]]:
    failed, compiled = failure.failed, failure.compiled
    if failed is None or compiled is None:
        return []
    places: dict[str, str] = {}
    found = []
    for change in changes(failed, compiled):
        name, where = failure.in_the_users_words(change.name, first_use(change.name, failed))
        places.setdefault(name, failure.where if name == _value(failure.words.op) else where)
        found.append(change._replace(name=name))
    return [(places[name], words) for name, words in told_together(found)]


def _counted(where: str, words: Words) -> tuple[str, Words]:
    if words.kind == "python_scalar" and counts_itself(where, words.op):
        return where, counter_words(words.op, is_read=is_read(where, words.op))
    return where, words


def limit_findings(records: Sequence[TraceRecord], compilations: Mapping[str, Compilation]) -> list[Finding]:
    """Return a finding for each function that Dynamo stopped compiling after too many recompiles."""
    found = []
    for record in records:
        if record.kind == "compilation_metrics" and _LIMIT.search(record.data.get("fail_reason") or ""):
            frame, _, times = record.compile_id.partition("/")
            same = [c for c in compilations.values() if c.function and c.compile_id.startswith(f"{frame}/")]
            found.append(
                Finding(
                    "recompile",
                    same[0].function if same else "",
                    same[0].where if same else "",
                    f"It was compiled {times} times. Then Dynamo gave up, and since then it runs uncompiled.",
                    "Remove the cause of the recompiles; see the other findings.",
                )
            )
    return found
