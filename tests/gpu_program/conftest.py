"""Prints, after the programs that a GPU would run were written, what came out and what it took."""

from __future__ import annotations

import resource
import time
from typing import Any

from fusion_compile._gpu_program.kernels import kernels_of

BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.gpu_program.generated_programs import COMPILATION, PROGRAMS

    if not COMPILATION.totals().kernels:
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(usage.ru_utime + usage.ru_stime for usage in used) / 60
    for key, found in PROGRAMS.items():
        name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        terminalreporter.write_line(f"{name}: {COMPILATION.totals(kernels_of(found.codes))}")
    launches = sum(len(found.launches) for found in PROGRAMS.values())
    terminalreporter.write_line(
        f"{len(PROGRAMS)} programs, {launches} launches, {COMPILATION.totals()}; "
        f"{(time.monotonic() - BEGAN) / 60:.1f} minutes, {minutes:.1f} of a core"
    )
