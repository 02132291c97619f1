"""What battery.py found, as tables in docs/results.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/results.md"
BEGIN, END = "<!-- written by python benchmarks/battery.py --table: begin -->", "<!-- end of the battery's tables -->"
Study = Mapping[str, Any]


def noise_of(first: Sequence[float], other: Sequence[float], *, paired: bool = True) -> float:
    """Two standard errors of the difference of the means: of pairs, or of two independent samples. nan for one seed."""
    if len(first) < 2 or not all(map(math.isfinite, (*first, *other))):
        return math.nan
    if paired:
        differences = [b - a for a, b in zip(first, other, strict=True)]
        return 2 * statistics.stdev(differences) / len(differences) ** 0.5
    return 2 * ((statistics.variance(first) + statistics.variance(other)) / len(first)) ** 0.5


def step_at(course: Sequence[float], target: float, steps: int) -> float:
    """The step at which a loss, taken after each of equal parts of `steps`, first is at `target`; nan for never."""
    before = math.inf
    for i, loss in enumerate(course, 1):
        if loss <= target:
            part = 0.0 if not math.isfinite(before) or before == loss else (target - loss) / (before - loss)
            return steps * (i - part) / len(course)
        before = loss
    return math.nan


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "none"


def compared(first: Sequence[float], other: Sequence[float], *, own: bool, paired: bool) -> str:
    """The mean of `other` and its noise floor. `own`: the first row's, which has no difference to itself."""
    if own:
        return number(statistics.mean(other))
    return f"{number(statistics.mean(other))} ± {number(noise_of(first, other, paired=paired))}"


def _taken(study: Study, key: str, part: str) -> list[float]:
    return [outcome[part] for outcome in study[key]]


def table_of(studies: Mapping[str, Study], first: str, controls: Mapping[str, str]) -> list[str]:
    """The lines of one task's table, the lowest loss first."""
    reference, steps = studies[first], studies[first]["steps"]
    courses = _taken(reference, "falling", "course")
    target = statistics.mean(course[len(course) // 2 - 1] for course in courses)
    lines = [
        f"| | rate | unseen | gap | unseen, constant rate | gap, constant rate | step of a loss of {target:.3f} |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(studies, key=lambda n: (n != first, statistics.mean(_taken(studies[n], "falling", "unseen"))))
    for name in order:
        study = studies[name]
        paired = not name.endswith("other seeds")
        cells = [f"{study['rate']:.2g}" + (" (edge)" if study["at the edge"] else "")]
        for key in ("falling", "constant"):
            for part in ("unseen", "gap"):
                values = _taken(reference, key, part), _taken(study, key, part)
                cells.append(compared(*values, own=name == first, paired=paired))
        found = [step_at(course, target, steps) for course in _taken(study, "falling", "course")]
        theirs = [step_at(course, target, steps) for course in courses]
        reached = [f for f in found if math.isfinite(f)]
        cells.append(
            f"{len(reached)} of {len(found)} reach it"
            if len(reached) < len(found)
            else f"{statistics.mean(found):.0f}"
            + ("" if name == first else f" ± {number(noise_of(theirs, found, paired=paired), 0)}")
        )
        shown = f"*{name}* (control)" if name in controls else name
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def written(kept: Mapping[str, Any], first: str, controls: Mapping[str, str]) -> str:
    """All tables in Markdown."""
    budget, machine = kept["budget"], kept["machine"]
    lines = [
        f"Budget of each recipe: {len(budget['factors'])} rates on seeds {budget['tuning']} for half of the steps, "
        f"then {len(budget['fresh'])} fresh seeds. torch {machine['torch']}, one thread ({machine['cpu']}), "
        f"{machine['date']}.",
    ]
    every = dict.fromkeys(name for task in kept["tasks"].values() for name in task["recipes"])
    for key, task in kept["tasks"].items():
        studies = task["recipes"]
        if first in studies:
            lines += ["", f"### {key}", f"{task['about']}. {studies[first]['steps']} steps.", ""]
            lines += table_of(studies, first, controls)
            if lacking := [name for name in every if name not in studies]:
                lines += ["", f"Not run: {', '.join(lacking)}."]
    if kept["costs"]:
        lines += ["", "### Bytes and time", "On the transformer of *photographs*. The update alone, compiled.", ""]
        lines += ["| | bytes of state a parameter | time over adamw's |", "|---|---|---|"]
        for name, cost in sorted(kept["costs"].items(), key=lambda item: item[1]["bytes"]):
            lines.append(f"| {name} | {cost['bytes']:.2f} | {cost['time']:.2f} |")
    return "\n".join(lines)


def put_into(page: str, tables: str) -> str:
    """`page` with `tables` between its two markers. ValueError for a page without them."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r}, between which the tables are written.")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def write_page(kept: Mapping[str, Any], first: str, controls: Mapping[str, str]) -> None:
    """Write the tables of `kept` into docs/results.md."""
    PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), written(kept, first, controls)), encoding="utf-8")
