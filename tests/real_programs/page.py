"""The table's page: what was found, between two markers of docs/real-programs.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.real_programs.program import DOORS, KINDS

BEGIN, END = "<!-- written by python -m tests.real_programs: begin -->", "<!-- end -->"

_HEAD = """## Programs that were run

Written by `python -m tests.real_programs`, which runs every row; do not edit. The programs are in
`tests/real_programs`.

- *step*: `compile_training_step`, captured as ATen operators, against the ordinary loop with `torch.optim.AdamW`.
- *sampler*: `optimize_sampler` in mode "eager", every output against the model's.
- *facade*: the ordinary loop with `as_torch_optimizer` in place of torch's AdamW.
- *explain*: `explain` of the step, of the loss where the step is refused, or of the sampler, with its findings.

A number is the largest difference of any loss, weight or output; 0 is bitwise. An empty field does not apply. What was
refused, or left to the whole model, has its sentence below its table; *eager equal* is the same step with
`mode="eager"`, where the sentence recommends it.
"""

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Kind -> row -> door -> verdict, difference and sentence."""


def section(results: Mapping[str, Any], rows: Mapping[str, Sequence[str]]) -> str:
    """The section of the page; `rows`: the rows of each kind in their order."""
    found: Found = results["found"]
    parts = [BEGIN, "", _HEAD]
    for kind, title in KINDS.items():
        known = [row for row in rows[kind] if row in found.get(kind, {})]
        parts += [f"### {title}", "", _table(kind, {row: found[kind][row] for row in known}), ""]
        if said := _sentences({row: found[kind][row] for row in known}):
            parts += [said, ""]
    machine = results["machine"]
    parts += [f"Last run {machine['date']}, torch {machine['torch']}, {machine['cpu']}, {results['minutes']} minutes."]
    return "\n".join([*parts, "", END])


def put_into(page: str, written: str) -> str:
    """`page` with `written` in place of what stands between the markers, or at its end."""
    before, begin, rest = page.partition(BEGIN)
    if not begin:
        return f"{page.rstrip()}\n\n{written}\n"
    return before + written + rest.partition(END)[2]


def cell(outcome: Mapping[str, Any] | None) -> str:
    """One field of the table."""
    if outcome is None:
        return ""
    if outcome["verdict"] == "explained":
        return outcome["said"] or "nothing found"
    number = outcome["difference"]
    said = "" if number is None else ", 0" if number == 0 else f", {number:.0e}"
    if outcome["verdict"] in ("equal", "differs"):
        return f"{outcome['verdict']}{said}"
    return f"refused; eager equal{said}" if outcome["verdict"] == "refused" and said else str(outcome["verdict"])


def _table(kind: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    head = [KINDS[kind].lower(), *DOORS]
    lines = [head, ["---"] * len(head)]
    lines += [[row, *(cell(outcomes.get(door)) for door in DOORS)] for row, outcomes in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentences(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each sentence, with the rows and doors that it is said to."""
    told: dict[str, list[str]] = {}
    for row, outcomes in found.items():
        for door in DOORS:
            outcome = outcomes.get(door)
            if outcome is not None and outcome["said"] and outcome["verdict"] != "explained":
                told.setdefault(outcome["said"], []).append(f"{row} ({door})")
    return "\n".join(f"- {', '.join(where)}: {sentence}" for sentence, where in told.items())
