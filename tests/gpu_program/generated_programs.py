"""Programs as a GPU would run them, each written once in a session and compiled once for each architecture."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

from torch import fx

from fusion_compile._gpu_program._compat import ARCHITECTURES, H100, compile_kernel, generate, pretended
from fusion_compile._gpu_program.generated import Generated
from fusion_compile._gpu_program.kernels import Compilation, kernels_of
from fusion_compile._gpu_program.moved import in_aten
from fusion_compile._gpu_program.objections import objections
from fusion_compile._program.program import REGIONS, Program

QUICK, FULL = (bool(os.environ.get(f"CUDA_CODEGEN_{name}")) for name in ("QUICK", "FULL"))
"""Of a kernel, the configuration that Inductor tries first is compiled, for every architecture. With `QUICK` for the
H100 alone; with `FULL` in every configuration that Inductor would try, which are about three."""
COMPILATION = Compilation(
    (H100.architecture,) if QUICK else ARCHITECTURES, partial(compile_kernel, configurations=None if FULL else 1)
)
"""Of all programs of the session; what it found is printed at the end."""
PROGRAMS: dict[Hashable, Generated] = {}


def written(key: Hashable, program: Program, *, mode: str = "max-autotune") -> Generated:
    """`program` as Inductor writes it for an H100, remembered by `key`."""
    if key not in PROGRAMS:
        graph: fx.GraphModule = program.graph if program.captured_by == "run" else in_aten(program.graph)
        found = PROGRAMS[key] = generate(graph, mode=mode)
        kernels = sum(len(re.findall(r"^ +triton_\w+\.run\(", code, re.M)) for code in found.codes)
        assert kernels == sum(launch.kind == "triton" for launch in found.launches), "a launch was not counted"
    return PROGRAMS[key]


def batch_inputs(program: Program) -> list[str]:
    """The inputs of a step that are copied before a replay."""
    return [name for name, said in program.input_names.items() if said.startswith("batch/")]


def wrong_with(found: Generated, *, batch: Sequence[str] | None, recorded: bool = True) -> list[str]:
    """Objections to a program, and its kernels that do not compile for one of the architectures."""
    said = objections(found, batch=batch, recorded=recorded)
    with pretended(H100):
        return said + COMPILATION.add(kernels_of(found.codes))


_IN_FLOAT64 = re.compile(r"empty_strided_cuda\(\(([^)]*)\), \([^)]*\), torch\.float64\)")


def most_in_float64(found: Generated) -> int:
    """Entries of the largest tensor that a program computes in float64: which a GPU does slowly."""
    shapes = (shape for code in found.codes for shape in _IN_FLOAT64.findall(code))
    return max((math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes), default=0)


class Row(NamedTuple):
    """Launches of one program."""

    name: str
    found: Generated

    def __str__(self) -> str:
        by_region = Counter((launch.region, launch.kind) for launch in self.found.launches)
        cells = [f"{by_region[region, 'extern']:>4} + {by_region[region, 'triton']:<4}" for region in REGIONS]
        return f"{self.name:<18}{''.join(cells)}{len(self.found.launches):>5}"


def table(rows: Sequence[Row]) -> str:
    """Launches by region: library kernels + Triton kernels, and all."""
    heading = f"{'':<18}" + "".join(f"{region:>9}  " for region in REGIONS) + "  all"
    return "\n".join([heading, *map(str, rows)]) + "\n"
