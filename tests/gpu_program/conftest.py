"""Prints, after the programs that a GPU would run were written, what came out and what it took."""

from __future__ import annotations

import resource
import time
from typing import Any

BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.gpu_program.generated_programs import COMPILATION, PROGRAMS

    if not COMPILATION.kernels:
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    minutes = sum(usage.ru_utime + usage.ru_stime for usage in used) / 60
    launches = sum(len(found.launches) for found in PROGRAMS.values())
    spilling = ", ".join(sorted(COMPILATION.spilling)) or "none"
    terminalreporter.write_line(
        f"{len(PROGRAMS)} programs, {launches} launches, {COMPILATION.kernels} different kernels, "
        f"{COMPILATION.binaries} binaries; at most {COMPILATION.most_registers} registers and "
        f"{COMPILATION.most_shared} bytes of shared memory; spilling: {spilling}; "
        f"{(time.monotonic() - BEGAN) / 60:.1f} minutes, {minutes:.1f} of a core"
    )
