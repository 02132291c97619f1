"""Programs that people run, by kind; ``python -m tests.real_programs`` runs them and writes the page."""

from __future__ import annotations

from tests.real_programs import containers, models, shapes, trainers, wrappers
from tests.real_programs.program import Program

PROGRAMS: dict[str, dict[str, Program]] = {
    "models": models.PROGRAMS,
    "trainers": trainers.PROGRAMS,
    "wrappers": wrappers.PROGRAMS,
    "shapes": shapes.PROGRAMS,
    "containers": containers.PROGRAMS,
}
