"""Guards and recompiles: the assumptions of a compiled program, and those that failed."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_compile.explain._facts import Guard, Recompile
from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.explain._run.recompile_reasons import Words, plain_words
from fusion_compile.explain._run.stacks import stack_frames, users_line
from fusion_compile.passes import Finding
from fusion_compile.passes._user_frame import is_the_users

_UNINTERESTING = ("DIMENSION_DYNAMIC_MARKING_GUARD", "GLOBAL_STATE", "TORCH_FUNCTION_MODE_STACK", "DEFAULT_DEVICE")
_LEAF = re.compile(r"^[| ]*\+- (\w+): (.*)$")
_MANAGER = re.compile(r"GuardManager: source=(.+?), accessed_by=.*?type=<class '([^']+)'>")
_COMMENT = re.compile(r"\s{2,}# (?P<source>.*?)\s{2}# (?P<file>\S+):(?P<line>\d+) in \S+(?: \(HINT: .*\))?\s*$")
_SCOPE = re.compile(r"\b[LG]\['(\w+)'\]")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]")
_TORCHS = re.compile(
    r"^__import_torch|^__builtins_dict|___dict_contains\('forward'|\._(modules|parameters|buffers) is of"
)
_LIMIT = re.compile(r"recompil\w* limit|recompile_limit|cache_size_limit", re.IGNORECASE)


@dataclass(frozen=True)
class Compilation:
    """One compilation of one function. `types`: types of the guarded values, by name as the user wrote it
    (``"self.lr"``)."""

    compile_id: str
    function: str
    file: str
    line: int
    guards: tuple[Guard, ...]
    types: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.file else ""


def read_compilations(records: Sequence[TraceRecord]) -> dict[str, Compilation]:
    """Read the compilations in `records`, by compile id, in order."""
    found: dict[str, Compilation] = {}
    for compile_id in dict.fromkeys(r.compile_id for r in records if r.compile_id):
        own = [r for r in records if r.compile_id == compile_id]
        compiled = [r.data for r in own if r.kind == "compilation_metrics" and r.data.get("co_name")]
        metrics: dict[str, Any] = compiled[0] if compiled else {}
        files = {str(metrics.get("co_filename", ""))} | _files(own)
        text = next((r.payload for r in reversed(own) if r.kind == "dynamo_cpp_guards_str"), "")
        guards, types = read_guards(text, files)
        found[compile_id] = Compilation(
            compile_id,
            str(metrics.get("co_name", "")),
            str(metrics.get("co_filename", "")),
            int(metrics.get("co_firstlineno", 0)),
            guards,
            types,
        )
    return found


def _files(records: Sequence[TraceRecord]) -> set[str]:
    """Return the user's files whose full path occurs in the compilation's messages."""
    texts = [r.payload for r in records if r.kind in ("recompile_reasons", "dynamo_graph_break_reason")]
    texts += [r.payload for r in records if r.kind.endswith("_graph")]
    return {path for text in texts for path in re.findall(r'[Ff]ile:? "?([^\n":]+\.py)', text) if is_the_users(path)}


def read_guards(text: str, files: set[str]) -> tuple[tuple[Guard, ...], dict[str, str]]:
    """Read the guards that the user's lines need, and the types of the guarded values, from the text of a guard tree.

    `files`: full paths; the tree shortens its paths, and these complete them.
    """
    guards: dict[Guard, None] = {}
    types: dict[str, str] = {}
    for line in text.splitlines():
        if manager := _MANAGER.search(line):
            types[_as_written(manager[1])] = manager[2]
        leaf = _LEAF.match(line)
        if leaf is None or leaf[1] in _UNINTERESTING or leaf[1].endswith("Manager"):
            continue
        comment = _COMMENT.search(leaf[2])
        if comment and (where := _place(comment["file"], comment["line"], files)):
            said = _readable(_as_written(leaf[2][: comment.start()]))
            if not _TORCHS.search(said):
                guards[Guard(said, where)] = None
    return tuple(guards), types


def _as_written(guard: str) -> str:
    """Rewrite a guard with the names as the user wrote them."""
    return _MEMBER.sub(r".\1", _SCOPE.sub(r"\1", guard)).strip()


def _readable(guard: str) -> str:
    """Remove torch's dispatch keys and the addresses of objects from a guard."""
    if found := re.match(
        r"check_tensor\((.+?), (?:Tensor|Parameter), DispatchKeySet\(.*?\), (torch\.\w+), (.*)\)$", guard
    ):
        return f"{found[1]}: {found[2]}, {found[3].removeprefix('device=None, ')}"
    if found := re.match(r"___check_(obj|type)_id\((.+), \d+\)(?:, type=<class '(.+)'>)?", guard):
        kind = found[3] or "what it was"
        return f"{found[2]} is of type {kind}" if found[1] == "type" else f"{found[2]} is the same object ({kind})"
    return guard


def _place(shortened: str, line: str, files: set[str]) -> str:
    """Return ``file:line`` in full, or "" for a line that is not the user's. Torch cuts off the start of the path."""
    full = next((path for path in sorted(files) if path.endswith(shortened)), "") or _loaded_file(shortened)
    return f"{full}:{line}" if full and is_the_users(full) else ""


@functools.lru_cache(maxsize=1024)
def _loaded_file(ending: str) -> str:
    """Return the file of the loaded module whose path ends so; "" if there is none or more than one."""
    files = {vars(module).get("__file__") for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    found = [file for file in files if isinstance(file, str) and file.endswith(ending)]
    return found[0] if len(found) == 1 else ""


@dataclass(frozen=True)
class Failure:
    """A guard of the compilation `failed` that did not hold and caused the compilation `compile_id`.

    `text`: the guard as the user would write it (``"lr == 0.1"``), or torch's sentence about a tensor.
    """

    text: str
    where: str
    compile_id: str
    failed: Compilation | None

    @property
    def words(self) -> Words:
        return plain_words(self.text, self.failed.types if self.failed else {})


def read_failures(
    records: Sequence[TraceRecord], compilations: Mapping[str, Compilation], *, of_these_only: bool
) -> tuple[Failure, ...]:
    """Read for each recompile the failed guard of the program compiled last, which is the closest one.

    `of_these_only`: ignore guards of programs that are not in `compilations`; they belong to earlier runs.
    """
    found = []
    for record in records:
        if record.kind == "recompile_reasons":
            failures = [_failure(reason, record.compile_id, compilations) for reason in _reasons(record.payload)]
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


def _failure(reason: str, compile_id: str, compilations: Mapping[str, Compilation]) -> Failure:
    head, _, stack = reason.partition("\nUser stack trace:")
    label = re.match(r"(\d+/\d+): ", head)
    failed = compilations.get(label[1]) if label else None
    head = head[label.end() :] if label else head
    comment = _COMMENT.search(head)
    text = _as_written(head[: comment.start()] if comment else head)
    where = users_line(stack_frames(stack))
    if not where and comment:
        where = _place(comment["file"], comment["line"], {failed.file} if failed else set())
    if not where and failed is not None:
        where = _first_use(plain_words(text, failed.types).op, failed.guards) or failed.where
    return Failure(text, where, compile_id, failed)


def _first_use(name: str, guards: Sequence[Guard]) -> str:
    """Return the line of the first guard that reads `name`, or ""."""
    return next((g.where for g in guards if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", g.text)), "")


def recompile(failure: Failure, compilations: Mapping[str, Compilation]) -> Recompile:
    compiled = compilations.get(failure.compile_id) or failure.failed
    return Recompile(compiled.function if compiled else "", _readable(failure.text), failure.where, failure.compile_id)


def recompile_finding(failure: Failure) -> Finding:
    words = failure.words
    return Finding(words.kind, words.op, failure.where, words.why, words.remedy)


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
