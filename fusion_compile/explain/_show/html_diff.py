"""The rows of the page that compares two explanations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fusion_compile.explain._comparison import CallDelta, DifferenceFacts, OperatorDelta
from fusion_compile.explain._show.html_payload import Data, tensor_type
from fusion_compile.explain._show.html_plots import compared_memory_plots

_REGION_NUMBERS = ("nodes", "launches", "flops", "bytes", "microseconds")


def diff_rows(difference: DifferenceFacts, before: Data, after: Data) -> Data:
    """Return what the page shows: `difference`, and both explanations' other tables paired by name."""
    return {
        "summary": _summary(before["summary"], after["summary"]),
        "environment": [
            (key, before["environment"].get(key, ""), after["environment"].get(key, ""))
            for key in dict.fromkeys([*before["environment"], *after["environment"]])
        ],
        "findings": {
            "new": difference.findings_new,
            "gone": difference.findings_gone,
            "same": difference.findings_same,
        },
        "graphs": [
            _graph(name, one, other, at)
            for at, (name, one, other) in enumerate(_paired(before["graphs"], after["graphs"]))
        ],
        "operators": _operators(difference.operators),
        "changed": _changed(difference.calls),
        "passes": [
            (
                name,
                one and (one["nodes_before"], one["nodes_after"]),
                other and (other["nodes_before"], other["nodes_after"]),
            )
            for name, one, other in _paired(before["passes"], after["passes"])
        ],
        "runtime": [(d.label, d.before, d.after, d.seconds) for d in difference.runtime],
    }


def _paired(before: Iterable[Data], after: Iterable[Data]) -> list[tuple[str, Data | None, Data | None]]:
    """Pair rows by name, and by occurrence if a name occurs twice."""

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


def _operators(deltas: Iterable[OperatorDelta]) -> list[tuple[str, str, int, int, float, float]]:
    return [(d.operator, d.region, d.before, d.after, d.microseconds_before, d.microseconds_after) for d in deltas]


def _changed(deltas: tuple[CallDelta, ...]) -> Data:
    """Return the columns of the calls that one side has more often."""
    return {
        "op": [delta.call.operator for delta in deltas],
        "region": [delta.call.region for delta in deltas],
        "type": [tensor_type(delta.call.dtype, delta.call.shape) for delta in deltas],
        "where": [delta.call.where for delta in deltas],
        "before": [delta.before for delta in deltas],
        "after": [delta.after for delta in deltas],
        "microseconds": [float(f"{delta.microseconds:.5g}") for delta in deltas],
        "count": len(deltas),
    }
