"""What keeps a generated program from being one CUDA graph without a wait, in sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fusion_compile._gpu_program.generated import Generated
from fusion_compile._gpu_program.side_by_side import collisions

_STRINGS_AND_COMMENTS = re.compile(r"'''.*?'''|#[^\n]*", re.S)
_HOST = re.compile(
    r"\.item\(\)|\.cpu\(\)|_local_scalar_dense|empty_strided_cpu\(|device_put|pin_memory|device\(type='cpu'\)"
)
_LAUNCH = re.compile(r"triton_\w+\.run\(|extern_kernels\.\w+\(|cpp_fused\w*\(")


def objections(found: Generated, *, batch: Iterable[str] | None, recorded: bool = True) -> list[str]:
    """What is wrong with a generated program; nothing if it is one graph, in one partition, that never waits.

    Args:
        found: The program.
        batch: Names of the inputs that may be copied before each replay; None where any may.
        recorded: Whether it is to become one CUDA graph.

    Returns:
        Sentences.
    """
    wrong = []
    if len(found.codes) != 1:
        wrong.append(f"Inductor made {len(found.codes)} graphs of the program and not one.")
    for reason in dict.fromkeys(found.skips):
        wrong.append(f"no CUDA graph would be recorded: {reason}.")
    if recorded and len(found.partitions) != 1:
        wrong.append(f"the program is cut into {len(found.partitions)} CUDA graphs and not one.")
    for partition in found.partitions if recorded else ():
        if moving := sorted(partition.written - partition.static):
            wrong.append(f"state that is written has no fixed address: {', '.join(moving)}.")
        if batch is not None and (copied := sorted(set(partition.inputs) - partition.static - set(batch))):
            wrong.append(f"besides the batch, inputs are copied before every replay: {', '.join(copied)}.")
    if others := sorted(found.devices - {"cuda"}):
        wrong.append(f"the program computes on {', '.join(others)} as well.")
    for code in found.codes:
        plain = _STRINGS_AND_COMMENTS.sub("", code)
        lines = [line.strip() for line in plain.splitlines() if _HOST.search(line)]
        wrong += [f"the program waits for the GPU or copies to the CPU: {line}" for line in lines[:3]]
        wrong += collisions(code)
        outside = _outside_of_partitions(plain)
        if recorded and outside:
            wrong.append(f"outside of the CUDA graph the program launches {', '.join(outside[:3])}.")
    return wrong


def _outside_of_partitions(code: str) -> list[str]:
    """Launches in the body of ``call``, which runs the partitions and should do nothing else."""
    if "def partition_0(" not in code:
        return []
    body = code.partition("def call(")[2]
    return [match.rstrip("(") for match in _LAUNCH.findall(body)]
