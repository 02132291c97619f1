"""Which room may import which: the architecture, written once.

A room is a package, or one of the two groups of loose modules: the ground that all stand on, and the public doors.
"""

from __future__ import annotations

from tests.house.source import within

GROUND = {
    "fusion_compile." + name
    for name in ("_compat", "_types", "_say_once", "_progress", "_notebook", "_factory", "_tracked", "_shared_memory")
}
"""Private torch API, the shared nouns, warnings said once, progress, MODULE:FACTORY of commands, tracked objects,
one memory."""
DOORS = {"fusion_compile", "fusion_compile.optim"} | {
    "fusion_compile." + name
    for name in (
        "training_step",
        "torch_optimizer",
        "optimizer_classes",
        "low_memory_classes",
        "sampler",
        "scalar_logger",
        "ema",
        "scaling",
        "cli",
        "optim.kaon",
        "optim.kaon_without_rate",
        "optim._of_kaon",
        "optim.kempner",
    )
}
"""What users import. `fusion_compile.optim` itself is a door, because it shows `as_torch_optimizer`; what lies below it
is the room "optim", but for the classes of other packages, which are doors, too."""

MAY_IMPORT: dict[str, str] = {
    "passes": "",  # graphs in, graphs out: torch and nothing of ours
    "ground": "passes",
    "optim.matrix": "",
    "optim": "ground optim.matrix",  # does not know that it is compiled
    "_capture": "ground passes",  # running user code without leaving a trace in it
    "_program": "ground passes",  # a graph becomes a compiled program
    "_gpu_program": "ground passes _program",  # a graph's program for a GPU, on a machine without one
    "_state": "ground optim",  # modules <-> banks <-> files
    "_ranks": "ground optim _program _state",  # torch.distributed; nobody else knows it, but for the files of _state
    "_step": "ground passes optim _capture _program _state _ranks",
    "_torch_optim": "ground optim _program _state _ranks _step",
    "_scaling": "",  # arithmetic: what travels and what Newton-Schulz costs
    "_sampler": "ground passes _capture _program",
    "explain": "ground passes _program _state _sampler",
    "doors": "ground passes optim _program _gpu_program _state _ranks _step _torch_optim _scaling _sampler explain",
    "integrations": "ground doors",  # other people's trainers; each module imports the library that it is named for
}
"""By room, the rooms that it may import besides itself. Every entry names only rooms above it in this table, so there
is no circle between rooms."""

STRANGERS = [
    ("fusion_compile._program.lower", "fusion_compile._program.cuda_graph"),
    ("fusion_compile.training_step", "fusion_compile.sampler"),
    ("fusion_compile.torch_optimizer", "fusion_compile.sampler"),
]
"""Modules of one room that never meet."""


def room_of(module: str) -> str | None:
    """The room that `module` lies in; None where it has none."""
    if module in DOORS:
        return "doors"
    if module in GROUND:
        return "ground"
    fitting = [room for room in MAY_IMPORT if within(module, f"fusion_compile.{room}")]
    return max(fitting, key=len) if fitting else None
