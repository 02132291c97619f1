"""Two explanations' data side by side: what is new, what is gone, what costs more."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from fusion_compile.explain._show.html_payload import Data, tensor_type
from fusion_compile.explain._show.html_plots import compared_memory_plots

_REGION_NUMBERS = ("nodes", "launches", "flops", "bytes", "microseconds")


def compare(before: Data, after: Data) -> Data:
    """Rows for the page's tables. A node is the same in both when its operator, type and source line are the same; its
    name and its place in the graph may differ."""
    return {
        "summary": _summary(before["summary"], after["summary"]),
        "environment": [
            (key, before["environment"].get(key, ""), after["environment"].get(key, ""))
            for key in dict.fromkeys([*before["environment"], *after["environment"]])
        ],
        "findings": _findings(before["findings"], after["findings"]),
        "graphs": [
            _graph(name, one, other, at)
            for at, (name, one, other) in enumerate(_paired(before["graphs"], after["graphs"]))
        ],
        "operators": _operators(before, after),
        "changed": _changed_nodes(before, after),
        "passes": [
            (
                name,
                one and (one["nodes_before"], one["nodes_after"]),
                other and (other["nodes_before"], other["nodes_after"]),
            )
            for name, one, other in _paired(before["passes"], after["passes"])
        ],
        "runtime": _runtime(before["runtime"], after["runtime"]),
    }


def _paired(before: Iterable[Data], after: Iterable[Data]) -> list[tuple[str, Data | None, Data | None]]:
    """By name, and by occurrence where a name comes twice."""

    def keyed(rows: Iterable[Data]) -> dict[tuple[str, int], Data]:
        seen: Counter[str] = Counter()
        found = {}
        for row in rows:
            found[row["name"], seen[row["name"]]] = row
            seen[row["name"]] += 1
        return found

    left, right = keyed(before), keyed(after)
    return [(key[0], left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right])]


def _summary(before: list[Data], after: list[Data]) -> list[tuple[str, str, str, str]]:
    left, right = ({row["label"]: row for row in rows} for rows in (before, after))
    rows = []
    for label in dict.fromkeys([*left, *right]):
        if label.startswith("most expensive"):  # the operators' table says it, with numbers
            continue
        one, other = left.get(label), right.get(label)
        status = (other or one or {})["status"]
        rows.append((label, one["value"] if one else "", other["value"] if other else "", status if other else "plain"))
    return rows


def _findings(before: list[Data], after: list[Data]) -> dict[str, list[Data]]:
    """Findings are paired by their lines first, then by their files, as an edit above moves a line."""
    gone, new = before, after
    for place in (str, _file):
        gone, new = _unpaired(gone, new, place), _unpaired(new, gone, place)
    return {"new": new, "gone": gone, "same": _unpaired(after, new, str)}


def _file(where: str) -> str:
    return where.rpartition(":")[0]


def _unpaired(findings: list[Data], others: list[Data], place: Callable[[str], str]) -> list[Data]:
    """What is left of `findings` when each of `others` has taken away one of its kind, operator and place."""

    def key(finding: Data) -> tuple[str, str, str]:
        return finding["kind"], finding["op"], place(finding["where"])

    left = Counter(key(finding) for finding in others)
    found = []
    for finding in findings:
        if left[key(finding)] > 0:
            left[key(finding)] -= 1
        else:
            found.append(finding)
    return found


def _graph(name: str, before: Data | None, after: Data | None, at: int) -> Data:
    nothing: Data = {"regions": [], "memory": {"curve": [], "peak_bytes": 0}}
    one, other = before or nothing, after or nothing
    regions = []
    for region, left, right in _paired(one["regions"], other["regions"]):
        regions.append((region, [_numbers(left, right, key) for key in _REGION_NUMBERS]))
    totals = [
        (sum(row[1][at][0] for row in regions), sum(row[1][at][1] for row in regions))
        for at in range(len(_REGION_NUMBERS))
    ]
    return {
        "name": name,
        "regions": regions,
        "totals": totals,
        "peak": (one["memory"]["peak_bytes"], other["memory"]["peak_bytes"]),
        "has_curve": bool(one["memory"]["curve"] or other["memory"]["curve"]),
        "plots": compared_memory_plots(one["memory"], other["memory"], f"compared-{at}"),
        "presence": "both" if before and after else "before" if before else "after",
    }


def _numbers(before: Data | None, after: Data | None, key: str) -> tuple[float, float]:
    return ((before or {}).get(key) or 0, (after or {}).get(key) or 0)


def _operators(before: Data, after: Data) -> list[tuple[str, int, int, float, float]]:
    """(operator, nodes before, nodes after, µs before, µs after) of those whose number or time changed."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for side, data in enumerate((before, after)):
        for graph in data["graphs"]:
            for node in graph["nodes"]:
                total = totals[node["op"]]
                total[side] += 1
                total[2 + side] += node["microseconds"] or 0
    changed = [
        (op, int(a), int(b), t, u) for op, (a, b, t, u) in totals.items() if a != b or abs(t - u) > 1e-3 * max(t, u)
    ]
    return sorted(changed, key=lambda row: (-abs(row[4] - row[3]), -abs(row[2] - row[1]), row[0]))


def _changed_nodes(before: Data, after: Data) -> Data:
    """Columns of the nodes that only one side has, or that one side has more often."""
    counts: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for side, data in enumerate((before, after)):
        for graph in data["graphs"]:
            for node in graph["nodes"]:
                key = (node["op"], node["region"] or "", tensor_type(node["dtype"], node["shape"]), node["where"] or "")
                total = counts[key]
                total[side] += 1
                total[2] += (node["microseconds"] or 0) * (1 if side else -1)
    rows = sorted(
        ((key, int(a), int(b), t) for key, (a, b, t) in counts.items() if a != b),
        key=lambda row: (-abs(row[3]), row[0]),
    )
    columns: Data = {name: [row[0][at] for row in rows] for at, name in enumerate(("op", "region", "type", "where"))}
    return columns | {
        "before": [row[1] for row in rows],
        "after": [row[2] for row in rows],
        "microseconds": [float(f"{row[3]:.5g}") for row in rows],
        "count": len(rows),
    }


def _runtime(before: Data | None, after: Data | None) -> list[tuple[str, float | None, float | None, bool]]:
    """(label, before, after, whether these are seconds); None where a side was not observed at runtime."""
    if before is None and after is None:
        return []

    def facts(runtime: Data | None) -> dict[str, tuple[float, bool]]:
        if runtime is None:
            return {}
        graphs: Any = runtime["cudagraphs"]
        counts = {
            "graph breaks": len(runtime["graph_breaks"]),
            "recompiles": len(runtime["recompiles"]),
            "guards": len(runtime["guards"]),
            "kernels": len(runtime["kernels"]),
            "fusion refusals": len(runtime["fusion_refusals"]),
            "CUDA graph captures": graphs["captures"],
            "CUDA graph partitions": graphs["partitions"],
            "CUDA graph skips": len(graphs["skips"]),
            "CUDA graph re-records": len(graphs["rerecords"]),
            "cache hits": runtime["cache"]["hits"],
            "cache misses": runtime["cache"]["misses"],
            "cache bypasses": runtime["cache"]["bypasses"],
        }
        seconds = {f"phase: {phase['name']}": (phase["seconds"], True) for phase in runtime["phases"]}
        return {label: (value, False) for label, value in counts.items()} | seconds

    left, right = facts(before), facts(after)
    rows = []
    for label in dict.fromkeys([*left, *right]):
        one, other = left.get(label), right.get(label)
        is_time = (one or other or (0, False))[1]
        rows.append((label, one and one[0], other and other[0], is_time))
    return rows
