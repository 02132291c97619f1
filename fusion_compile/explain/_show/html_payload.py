"""The explanation by columns, for the report's script. By columns a file of 20,000 nodes stays small."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from fusion_compile.explain._show.html_numbers import finite
from fusion_compile.explain._show.html_plots import region_colour

Data = dict[str, Any]

_SHORT_DTYPES = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "b8", "complex64": "c64", "complex128": "c128",
}  # fmt: skip


def payload(data: Data) -> Data:
    """Return the tables, each repeated string stored once. Findings, summary and plots are in the page itself."""
    runtime = data["runtime"] or {}
    hoisting = data["hoisting"]
    names = region_names(data)
    return {
        "graphs": [
            {"name": graph["name"], "nodes": len(graph["nodes"]), "curve": graph["memory"]["curve"]}
            for graph in data["graphs"]
        ],
        "regions": [[name, region_colour(name, names)] for name in names],
        "findings": [{key: finding[key] for key in ("kind", "op", "severity")} for finding in data["findings"]],
        "nodes": _nodes(data["graphs"], finding_places(data)),
        "passes": _passes(data["passes"]),
        "kernels": _rows(runtime.get("kernels", []), ("name", "nodes", "where", "source")),
        "refusals": _rows(runtime.get("fusion_refusals", []), ("first", "second", "reason")),
        "guards": _rows(runtime.get("guards", []), ("text", "where")),
        "hoisting": _rows(hoisting["values"] if hoisting else [], _HOISTING),
    }


_HOISTING = ("name", "kind", "binding_time", "decision", "reason", "chain", "bytes", "flops", "frees_bytes")


def finding_places(data: Data) -> dict[str, int]:
    """Return the position of each finding by its identity; links on the page name positions."""
    return {finding["id"]: at for at, finding in enumerate(data["findings"])}


def region_names(data: Data) -> list[str]:
    """Return the regions of all graphs, in the order of their first appearance."""
    return list(dict.fromkeys(region["name"] for graph in data["graphs"] for region in graph["regions"]))


def tensor_type(dtype: str | None, shape: Sequence[int | str] | None) -> str:
    """``tensor_type("torch.bfloat16", [4, "s0"])`` -> ``"bf16[4, s0]"``; ``""`` without a dtype."""
    if not dtype:
        return ""
    name = dtype.removeprefix("torch.")
    return f"{_SHORT_DTYPES.get(name, name)}[{', '.join(str(size) for size in shape or ())}]"


def _coded(values: Iterable[str | None]) -> Data:
    """``["a", "b", "a"]`` -> ``{"values": ["a", "b"], "codes": [0, 1, 0]}``."""
    places: dict[str, int] = {}
    codes = [places.setdefault(value or "", len(places)) for value in values]
    return {"values": list(places), "codes": codes}


def _nodes(graphs: Sequence[Data], places: Mapping[str, int]) -> Data:
    nodes = [node for graph in graphs for node in graph["nodes"]]
    return {
        "name": [node["name"] for node in nodes],
        "inputs": [node["inputs"] for node in nodes],
        "finding": [places.get(node["finding"], -1) for node in nodes],
        "type": _coded(tensor_type(node["dtype"], node["shape"]) for node in nodes),
        "launches": [node["launches"] for node in nodes],
        "recomputed": [node.get("recomputed", 0) for node in nodes],
        "read": [node["bytes_read"] for node in nodes],
        "written": [node["bytes_written"] for node in nodes],
        "flops": [node["flops"] for node in nodes],
        "intensity": [_rounded(node["intensity"]) for node in nodes],
        "microseconds": [_rounded(node["microseconds"]) for node in nodes],
    } | {key: _coded(node[key] for node in nodes) for key in ("op", "region", "module", "where", "binding_time")}


def _rounded(value: float | None) -> float | None:
    value = finite(value)
    return None if value is None else float(f"{value:.5g}")


def _rows(rows: Sequence[Data], keys: Sequence[str]) -> Data:
    return {key: [row[key] for row in rows] for key in keys} | {"count": len(rows)}


def _passes(passes: Sequence[Data]) -> Data:
    """Store each text as numbers of lines. A pass starts from the result of the one before, so most lines repeat."""
    places: dict[str, int] = {}
    texts = []
    for each in passes:
        before, after = ([places.setdefault(line, len(places)) for line in each[side]] for side in ("before", "after"))
        # If nothing changed, the text is on the left only.
        texts.append({"before": before, "after": None if before == after else after, "parts": _parts(before, after)})
    return {"lines": list(places), "texts": texts}


def _parts(before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
    """Return the changed parts, each ``[from, to, from, to]`` in the lines before and after, in order."""
    parts: list[list[int]] = []
    i = j = 0
    for next_i, next_j in [*_anchors(before, after), (len(before), len(after))]:
        if next_i > i or next_j > j:
            matcher = SequenceMatcher(None, before[i:next_i], after[j:next_j], autojunk=False)
            for tag, i1, i2, j1, j2 in matcher.get_opcodes():
                if tag != "equal":
                    _extend(parts, [i + i1, i + i2, j + j1, j + j2])
        i, j = next_i + 1, next_j + 1
    return parts


def _extend(parts: list[list[int]], part: list[int]) -> None:
    """Append `part`, or extend the last part if `part` starts where it ends."""
    if parts and parts[-1][1] == part[0] and parts[-1][3] == part[2]:
        parts[-1][1], parts[-1][3] = part[1], part[3]
    else:
        parts.append(part)


def _anchors(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
    """Return the longest sequence of lines that occur once on each side and in the same order on both.

    A line of a graph names its node, so nearly all lines are unique. The parts between them are short; without them
    `SequenceMatcher` takes seconds for a graph of 20,000 nodes.
    """
    once_before, once_after = (_once(lines) for lines in (before, after))
    pairs = [(i, once_after[line]) for line, i in once_before.items() if line in once_after]
    ends: list[int] = []  # by length of the sequences so far: the smallest place after at which one ends
    last: list[int] = []  # the pair that ends each of them
    previous: list[int] = []
    for at, (_, j) in enumerate(pairs):
        length = bisect_left(ends, j)
        previous.append(last[length - 1] if length else -1)
        ends[length : length + 1] = [j]
        last[length : length + 1] = [at]
    run: list[tuple[int, int]] = []
    at = last[-1] if last else -1
    while at >= 0:
        run.append(pairs[at])
        at = previous[at]
    return run[::-1]


def _once(lines: Sequence[int]) -> dict[int, int]:
    """Map each line that occurs once to its place, in order."""
    counts = Counter(lines)
    return {line: at for at, line in enumerate(lines) if counts[line] == 1}
