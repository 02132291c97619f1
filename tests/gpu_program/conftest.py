"""Prints, after the programs that a GPU would run were written, what came out and what it took."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fusion_compile._gpu_program._compat import H100, captured_for
from fusion_compile._gpu_program.kernels import kernels_of

BEGAN = time.monotonic()
OF_WORKERS: list[str] = []
"""What the processes of pytest-xdist found, which have the programs."""


@pytest.fixture(autouse=True)
def captured_as_for_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a test that writes a GPU's program."""
    if request.node.get_closest_marker("cuda_codegen") is None:
        yield
        return
    with captured_for(H100):
        yield


def found() -> list[str]:
    """A line for each program that this process wrote, and one for all."""
    from tests.gpu_program.generated_programs import COMPILATION, PROGRAMS

    if not COMPILATION.totals().kernels:
        return []
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(usage.ru_utime + usage.ru_stime for usage in used) / 60
    lines = []
    for key, program in PROGRAMS.items():
        name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        lines.append(f"{name}: {COMPILATION.totals(kernels_of(program.codes))}")
    launches = sum(len(program.launches) for program in PROGRAMS.values())
    lines.append(
        f"{len(PROGRAMS)} programs, {launches} launches, {COMPILATION.totals()}; "
        f"{(time.monotonic() - BEGAN) / 60:.1f} minutes, {minutes:.1f} of a core"
    )
    return lines


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: Any = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["gpu_program"] = found()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    OF_WORKERS.extend(getattr(node, "workeroutput", {}).get("gpu_program", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in OF_WORKERS or found():
        terminalreporter.write_line(line)
