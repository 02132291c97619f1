"""Inductor's kernels, with the nodes and source lines they come from, and its reasons not to fuse more."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fusion_compile.explain._facts import FusionRefusal, Kernel
from fusion_compile.explain._run.listen import FusionLine, TraceRecord
from fusion_compile.explain._run.stacks import stack_frames, users_line

_DEFINITION = re.compile(r"^(?P<name>\w+) = async_compile\.\w+\((?P<source>.*?)^'''.*?\)$", re.MULTILINE | re.DOTALL)
_NODES = re.compile(r"^ *# Topologically Sorted Source Nodes: \[(?P<nodes>[^\]]*)\]", re.MULTILINE)
_HANDLE = re.compile(r":\d+$")


def read_kernels(records: Sequence[TraceRecord]) -> tuple[Kernel, ...]:
    """Read generated kernels and calls of library kernels, in the order in which the programs call them."""
    kernels: list[Kernel] = []
    for i, record in enumerate(records):
        if record.kind == "inductor_output_code":
            later = _until_next_code(records[i + 1 :], record.compile_id)
            mappings = _json(later, "inductor_provenance_tracking_node_mappings")
            stacks = _json(later, "inductor_provenance_tracking_kernel_stack_traces")
            kernels += _of_program(record.payload, mappings.get("cppCodeToPost") or {}, stacks)
    return tuple(kernels)


def _until_next_code(records: Sequence[TraceRecord], compile_id: str) -> list[TraceRecord]:
    found = []
    for record in records:
        if record.compile_id == compile_id:
            if record.kind == "inductor_output_code":
                break
            found.append(record)
    return found


def _json(records: Sequence[TraceRecord], kind: str) -> dict[str, Any]:
    text = next((r.payload for r in records if r.kind == kind and r.payload), "")
    try:
        read = json.loads(text) if text else {}
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _of_program(code: str, nodes: dict[str, list[str]], stacks: dict[str, list[str]]) -> list[Kernel]:
    sources = {found["name"]: found[0] for found in _DEFINITION.finditer(code)}
    if not nodes:  # this torch kept no provenance, so read the comments in the code
        return [Kernel(name, _commented(code, name), (), source) for name, source in sources.items()]
    return [
        Kernel(
            _HANDLE.sub("", name),
            tuple(dict.fromkeys(made_from)),
            _lines(stacks.get(name) or stacks.get(_HANDLE.sub("", name)) or ()),
            sources.get(_HANDLE.sub("", name), ""),
        )
        for name, made_from in nodes.items()
    ]


def _commented(code: str, name: str) -> tuple[str, ...]:
    before = code[: code.find(f"{name} = async_compile")]
    comments = _NODES.findall(before)
    return tuple(n.strip() for n in comments[-1].split(",")) if comments else ()


def _lines(stacks: Sequence[str]) -> tuple[str, ...]:
    """Return the user's line of each stack, each line once."""
    return tuple(dict.fromkeys(filter(None, (users_line(stack_frames(stack)) for stack in stacks))))


def read_refusals(lines: Sequence[FusionLine]) -> tuple[FusionRefusal, ...]:
    """Read the pairs of operators that Inductor declined to fuse, by FX node, with its reason. Keep each pair once."""
    found = []
    for line in lines:
        pair, _, reason = line.text.removeprefix("cannot fuse ").partition(": ")
        first, _, second = pair.partition(" with ")
        reason = " ".join(reason.split())
        found.append(FusionRefusal(", ".join(line.first) or first, ", ".join(line.second) or second, reason))
    return tuple(dict.fromkeys(found))
