"""The compilations of a run: their guards, and the sizes and numbers that they were compiled for."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_compile.explain._facts import Guard
from fusion_compile.explain._run.listen import TraceRecord
from fusion_compile.passes._user_frame import is_the_users

_UNINTERESTING = ("DIMENSION_DYNAMIC_MARKING_GUARD", "GLOBAL_STATE", "TORCH_FUNCTION_MODE_STACK", "DEFAULT_DEVICE")
_LEAF = re.compile(r"^[| ]*\+- (\w+): (.*)$")
_MANAGER = re.compile(r"GuardManager: source=(.+?), accessed_by=.*?type=<class '([^']+)'>")
COMMENT = re.compile(r"\s{2,}# (?P<source>.*?)\s{2}# (?P<file>\S+):(?P<line>\d+) in \S+(?: \([^#]*\))?\s*$")
"""What torch writes behind a guard: the source line that needs it, and its place with the start of the path cut off."""
_SCOPE = re.compile(r"\b[LG]\['(\w+)'\]")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]")
_KEY = re.compile(r"\[list\(dict\.keys\([^()]*\)\)\[\d+\]\]")
"""A key of a dictionary that torch writes by its number, because it is no text: a parameter in an optimizer's state."""
_TORCHS = re.compile(
    r"^__import_torch|^__builtins_dict|___dict_contains\('forward'|\._(modules|parameters|buffers) is of"
)
_SIZES = re.compile(r"^check_tensor\((?P<name>.+?), \w+, DispatchKeySet\(.*\bsize=\[(?P<sizes>[^\]]*)\]")
_NUMBER = re.compile(r"^(?P<name>[A-Za-z_][\w.\[\]'\"…]*) == (?P<value>-?(?:\d[\d.]*(?:e[+-]?\d+)?|inf))$")


@dataclass(frozen=True)
class Compilation:
    """One compilation of one function.

    `types`: types of the guarded values, by name as the user wrote it (``"self.lr"``).
    `fixed_sizes`: sizes of the tensors that it was compiled for, None where any size will do.
    `fixed_numbers`: Python numbers that it was compiled for, as text.
    `sizes`, `numbers`: those of the call that caused it, as far as torch tells them.
    """

    compile_id: str
    function: str
    file: str
    line: int
    guards: tuple[Guard, ...]
    types: Mapping[str, str]
    fixed_sizes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    fixed_numbers: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)

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
        fixed_sizes, fixed_numbers = _fixed(text)
        found[compile_id] = Compilation(
            compile_id,
            str(metrics.get("co_name", "")),
            str(metrics.get("co_filename", "")),
            int(metrics.get("co_firstlineno", 0)),
            guards,
            types,
            fixed_sizes,
            fixed_numbers,
            _sizes(own),
            fixed_numbers | _numbers(own),
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
            types[as_written(manager[1])] = manager[2]
        leaf = _LEAF.match(line)
        if leaf is None or leaf[1] in _UNINTERESTING or leaf[1].endswith("Manager"):
            continue
        comment = COMMENT.search(leaf[2])
        if comment and (where := place(comment["file"], comment["line"], files)):
            said = readable(as_written(leaf[2][: comment.start()]))
            if not _TORCHS.search(said):
                guards[Guard(said, where)] = None
    return tuple(guards), types


def _fixed(text: str) -> tuple[dict[str, tuple[int | None, ...]], dict[str, str]]:
    """Read the sizes and the numbers that a guard tree fixes, by name."""
    sizes: dict[str, tuple[int | None, ...]] = {}
    numbers: dict[str, str] = {}
    for line in text.splitlines():
        leaf = _LEAF.match(line)
        if leaf is None:
            continue
        said = as_written(re.split(r"\s{2,}# ", leaf[2])[0])
        if leaf[1] == "TENSOR_MATCH" and (found := _SIZES.match(said)):
            given = [part.strip() for part in found["sizes"].split(",") if part.strip()]
            sizes[found["name"]] = tuple(int(part) if part.isdigit() else None for part in given)
        elif leaf[1] == "EQUALS_MATCH" and (found := _NUMBER.match(said)):
            numbers[found["name"]] = found["value"]
    return sizes, numbers


def _sizes(records: Sequence[TraceRecord]) -> dict[str, tuple[int, ...]]:
    """Read the sizes of the tensors that a compilation was given, by name."""
    described = {
        (r.data.get("describer_id"), r.data.get("id")): r.data.get("size")
        for r in records
        if r.kind == "describe_tensor"
    }
    found = {}
    for record in records:
        if record.kind == "describe_source":
            size = described.get((record.data.get("describer_id"), record.data.get("id")))
            if size is not None and all(isinstance(n, int) for n in size):
                found[as_written(str(record.data.get("source")))] = tuple(size)
    return found


def _numbers(records: Sequence[TraceRecord]) -> dict[str, str]:
    """Read the Python numbers for which a compilation made symbols, by name."""
    return {as_written(str(r.data.get("source"))): str(r.data.get("val")) for r in records if r.kind == "create_symbol"}


def as_written(guard: str) -> str:
    """Rewrite a guard with the names as the user wrote them."""
    return _KEY.sub("[…]", _MEMBER.sub(r".\1", _SCOPE.sub(r"\1", guard))).strip()


def readable(guard: str) -> str:
    """Remove torch's dispatch keys and the addresses of objects from a guard."""
    if found := re.match(
        r"check_tensor\((.+?), (?:Tensor|Parameter), DispatchKeySet\(.*?\), (torch\.\w+), (.*)\)$", guard
    ):
        return f"{found[1]}: {found[2]}, {found[3].removeprefix('device=None, ')}"
    if found := re.match(r"___check_(obj|type)_id\((.+), \d+\)(?:, type=<class '(.+)'>)?", guard):
        kind = found[3] or "what it was"
        return f"{found[2]} is of type {kind}" if found[1] == "type" else f"{found[2]} is the same object ({kind})"
    return guard


def place(shortened: str, line: str, files: set[str]) -> str:
    """Return ``file:line`` in full, or "" for a line that is not the user's. Torch cuts off the start of the path."""
    full = next((path for path in sorted(files) if path.endswith(shortened)), "") or _loaded_file(shortened)
    return f"{full}:{line}" if full and is_the_users(full) else ""


@functools.lru_cache(maxsize=1024)
def _loaded_file(ending: str) -> str:
    """Return the file of the loaded module whose path ends so; "" if there is none or more than one."""
    files = {vars(module).get("__file__") for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    found = [file for file in files if isinstance(file, str) and file.endswith(ending)]
    return found[0] if len(found) == 1 else ""
