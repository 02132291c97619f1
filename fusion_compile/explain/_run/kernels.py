"""Inductor's kernels with the nodes and lines they came from, and why it did not fuse more."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fusion_compile.explain._facts import FusionRefusal, Kernel
from fusion_compile.explain._run.graph_breaks import stack_frames
from fusion_compile.explain._run.listen import FusionLine, TraceRecord
from fusion_compile.passes._user_frame import is_the_users

_DEFINITION = re.compile(r"^(?P<name>\w+) = async_compile\.\w+\((?P<source>.*?)^'''.*?\)$", re.MULTILINE | re.DOTALL)
_NODES = re.compile(r"^ *# Topologically Sorted Source Nodes: \[(?P<nodes>[^\]]*)\]", re.MULTILINE)
_HANDLE = re.compile(r":\d+$")


def read_kernels(records: Sequence[TraceRecord]) -> tuple[Kernel, ...]:
    """Generated kernels and calls of library kernels, in the order of the programs that call them."""
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
    if not nodes:  # this torch kept no provenance: what the code's own comments say
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
    """``file:line`` of the innermost frame of the user's in each stack, each once."""
    found = []
    for stack in stacks:
        frames = [f for f in stack_frames(stack) if is_the_users(f[0])]
        if frames:
            found.append(f"{frames[-1][0]}:{frames[-1][1]}")
    return tuple(dict.fromkeys(found))


def read_refusals(lines: Sequence[FusionLine]) -> tuple[FusionRefusal, ...]:
    """Pairs of operators that Inductor looked at and did not fuse, with its reason, each once. Named by FX nodes."""
    found = []
    for line in lines:
        pair, _, reason = line.text.removeprefix("cannot fuse ").partition(": ")
        first, _, second = pair.partition(" with ")
        reason = " ".join(reason.split())
        found.append(FusionRefusal(", ".join(line.first) or first, ", ".join(line.second) or second, reason))
    return tuple(dict.fromkeys(found))
