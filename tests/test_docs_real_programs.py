"""The table of programs that were run is what its command writes, names every program, and says what is so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from tests.real_programs import PROGRAMS
from tests.real_programs.__main__ import JSON, PAGE
from tests.real_programs.doors import judged, refused, run_door
from tests.real_programs.page import BEGIN, END, cell, put_into, section
from tests.real_programs.program import DOORS, KINDS

# What torch, peft and transformers say of themselves while they run; of ours the rows are compared, not the warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

RESULTS: dict[str, Any] = json.loads(JSON.read_text(encoding="utf-8"))
NOT_EQUAL = {
    ("models", "Whisper", "step"): "reads a tensor's value on the host",
    ("models", "Wav2Vec2", "step"): "reads a tensor's value on the host",
    ("wrappers", "DistributedDataParallel, one process", "step"): "give the module inside",
    ("wrappers", "DistributedDataParallel, one process", "sampler"): "Build the sampler from the module inside",
    ("wrappers", "torch.jit.script", "step"): "give the module that it was scripted from",
    ("shapes", "more sizes than max_shapes", "step"): "raise the bound",
}
"""Kind, row, door -> a part of the sentence with which it is refused."""
QUICK = [
    ("trainers", "the plain loop", "facade"),
    ("trainers", "EMAModel of diffusers", "facade"),
    ("wrappers", "peft LoRA", "sampler"),
    ("wrappers", "torch.jit.script", "step"),
    ("wrappers", "torch.jit.script", "facade"),
    ("containers", "dataclass", "sampler"),
    ("containers", "an object that keeps tensors", "explain"),
    ("containers", "with a numpy array", "step"),
    ("shapes", "one size", "step"),
]
EVERY = [
    (kind, name, door)
    for kind, rows in PROGRAMS.items()
    for name, outcomes in ((name, RESULTS["found"].get(kind, {}).get(name, {})) for name in rows)
    for door in DOORS
    if outcomes.get(door) is not None
    and kind != "models"  # these have tests of their own, for the step and the sampler
]


def test_the_page_is_written_from_the_results_and_has_every_program() -> None:
    rows = {kind: [*programs] for kind, programs in PROGRAMS.items()}
    assert {kind: sorted(found) for kind, found in RESULTS["found"].items()} == {k: sorted(n) for k, n in rows.items()}
    page = PAGE.read_text(encoding="utf-8")
    assert page == put_into(page, section(RESULTS, rows))
    assert set(rows) == set(KINDS)
    assert all(len(rows[kind]) >= n for kind, n in zip(KINDS, (15, 6, 8, 6, 10), strict=True))


def test_everything_was_equal_or_is_refused_with_its_sentence() -> None:
    seen = {}
    for kind, rows in RESULTS["found"].items():
        for name, outcomes in rows.items():
            for door, outcome in outcomes.items():
                if outcome is not None and outcome["verdict"] not in ("equal", "explained"):
                    seen[kind, name, door] = outcome
    assert set(seen) == set(NOT_EQUAL)
    for where, sentence in NOT_EQUAL.items():
        assert seen[where]["verdict"] == "refused" and sentence in seen[where]["said"]
        assert ("mode='eager'" in seen[where]["said"]) == (seen[where]["difference"] is not None)  # which was run, too


def check(kind: str, name: str, door: str) -> None:
    program = PROGRAMS[kind][name]
    if program.needs and importlib.util.find_spec(program.needs) is None:
        pytest.skip(f"needs {program.needs}: make trainers")
    outcome, told = run_door(program, door), RESULTS["found"][kind][name][door]
    assert outcome is not None and outcome.verdict == told["verdict"], outcome
    if outcome.verdict != "equal":
        assert outcome.said == told["said"] or NOT_EQUAL[kind, name, door] in outcome.said


@pytest.mark.parametrize(("kind", "name", "door"), QUICK)
def test_a_row_is_as_the_page_says(kind: str, name: str, door: str) -> None:
    check(kind, name, door)


@pytest.mark.exhaustive  # about four minutes of one core
@pytest.mark.parametrize(("kind", "name", "door"), [row for row in EVERY if row not in QUICK])
def test_every_row_is_as_the_page_says(kind: str, name: str, door: str) -> None:
    check(kind, name, door)


def test_a_difference_and_a_foreign_error_are_no_success() -> None:
    import torch

    one = torch.ones(2)
    assert judged([one], [one + 1e-8]).verdict == "equal" and judged([one], [one + 1e-3]).verdict == "differs"
    try:
        one.view(5)
    except RuntimeError as error:
        assert refused(error, []).verdict == "crashes"
    assert cell(judged([one], [one + 1])._asdict()) == "differs, 1e+00" and cell(None) == ""


def test_a_section_goes_between_its_markers_and_leaves_the_rest() -> None:
    assert put_into("a\n", f"{BEGIN}x{END}") == f"a\n\n{BEGIN}x{END}\n"
    assert put_into(f"a\n{BEGIN}old{END}\nb\n", f"{BEGIN}x{END}") == f"a\n{BEGIN}x{END}\nb\n"
    assert Path(PAGE).read_text(encoding="utf-8").count(BEGIN) == 1
