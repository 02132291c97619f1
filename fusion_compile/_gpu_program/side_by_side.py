"""Kernels that were written into one launch must not touch each other's results: their blocks run at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from fusion_compile._gpu_program.kernels import Kernel, kernels_of, without_kernels

_BRANCH = re.compile(r"^    (?:if|elif) pid ", re.M)
_LOADED = re.compile(r"tl\.load\((\w+_ptr\d+)")
_STORED = re.compile(r"tl\.(?:store|atomic_\w+)\((\w+_ptr\d+)")
_CALL = re.compile(r"^\s*(triton_\w+)\.run\((.*), stream=", re.M)
_NAMED_AGAIN = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\((\w+),|(\w+)(?:;|\s*#|\s*$))")


class _Together(NamedTuple):
    """A launch of several kernels: its arguments' names, and of each kernel the arguments that it reads and writes."""

    arguments: list[str]
    touched: list[tuple[set[str], set[str]]]


def collisions(code: str) -> list[str]:
    """Sentences of launches in which one kernel writes memory that another reads, or both update in place.

    Two that write to one tensor are no fault: the parts of a bank lie there side by side.
    """
    together = {kernel.name: _together(kernel) for kernel in kernels_of([code]) if "combo_grid_meta" in kernel.source}
    called_again: dict[str, str] = {}
    wrong = []
    for line in without_kernels(code).splitlines():
        if (match := _NAMED_AGAIN.match(line)) and match[1] != (match[2] or match[3]):
            called_again[match[1]] = match[2] or match[3]
        if (match := _CALL.match(line)) and match[1] in together:
            launch = together[match[1]]
            given = dict(zip(launch.arguments, map(str.strip, _split(match[2])), strict=False))
            memory = {name: _memory(value, called_again) for name, value in given.items()}
            wrong += [
                f"{match[1]}: of the kernels launched together one writes {given[a]}, and another uses {given[b]}."
                for a, b in _shared(launch, memory)
            ]
    return wrong


def _together(kernel: Kernel) -> _Together:
    head = re.search(rf"def {kernel.name}\((.*)\):", kernel.source)
    assert head is not None
    branches = _BRANCH.split(kernel.source[head.end() :])[1:]
    names = [argument.partition(":")[0].strip() for argument in head[1].split(",")]
    return _Together(names, [(set(_LOADED.findall(b)), set(_STORED.findall(b))) for b in branches])


def _shared(launch: _Together, memory: dict[str, str]) -> Iterator[tuple[str, str]]:
    for i, (_, written) in enumerate(launch.touched):
        for j, (read, also_written) in enumerate(launch.touched):
            for a in sorted(written) if i != j else ():
                others = read | also_written if a.startswith("in_out") else read | (also_written & {a})
                yield from ((a, b) for b in sorted(others) if memory[a] == memory[b])


def _memory(value: str, called_again: dict[str, str]) -> str:
    view = re.match(r"reinterpret_tensor\((\w+),", value)
    name = view[1] if view else value
    while name in called_again:
        name = called_again[name]
    return name


def _split(arguments: str) -> list[str]:
    """At the commas that stand in no parentheses."""
    found, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found
