"""The Triton kernels in the text that Inductor wrote, and what a GPU's compiler makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_DEFINITION = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.M | re.S)
_NUMBER = re.compile(r"_\d+$")


class Kernel(NamedTuple):
    """One kernel: its name in the program and its Python text."""

    name: str
    source: str

    @property
    def identity(self) -> str:
        """Equal for kernels of two programs that differ in their running number alone."""
        return re.sub(rf"\b{self.name}\b", _NUMBER.sub("", self.name), self.source)


class Compiled(NamedTuple):
    """One configuration of one kernel as machine code. Of a thread: `registers`, and bytes `spilled` to local memory;
    of a block: bytes of `shared` memory."""

    configuration: str
    registers: int
    spilled: int
    shared: int
    error: str = ""


Compiler = Callable[[Kernel, int], Sequence[Compiled]]
"""From a kernel and an architecture to its configurations."""


def kernels_of(codes: Iterable[str]) -> list[Kernel]:
    """All kernels that the texts define, each once."""
    found = {kernel.identity: kernel for code in codes for kernel in (Kernel(*m) for m in _DEFINITION.findall(code))}
    return list(found.values())


def without_kernels(code: str) -> str:
    """The text that calls the kernels, without their definitions."""
    return _DEFINITION.sub("", code)


class Totals(NamedTuple):
    """Over kernels that were compiled: how many, how many binaries, the most registers and bytes of shared memory of
    one of them, and the names of those with a configuration that takes local memory: it spills, or a sine's reduction
    of its range keeps an array there, which torch's heuristics count as spilled, too."""

    kernels: int
    binaries: int
    most_registers: int
    most_shared: int
    spilling: tuple[str, ...]

    def __str__(self) -> str:
        spilling = f"{len(self.spilling)} with local memory" if self.spilling else "none with local memory"
        return (
            f"{self.kernels} kernels, {self.binaries} binaries, at most {self.most_registers} registers and "
            f"{self.most_shared} bytes of shared memory, {spilling}"
        )


@dataclass
class Compilation:
    """Kernels compiled for several architectures; a kernel that another program had already is not compiled again."""

    architectures: Sequence[int]
    compiler: Compiler
    _made: dict[str, list[tuple[int, Compiled]]] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def add(self, kernels: Iterable[Kernel]) -> list[str]:
        """Compile what is new. Return the sentences of those among `kernels` that do not compile."""
        wrong = []
        for kernel in kernels:
            if kernel.identity not in self._made:
                self._names[kernel.identity] = kernel.name
                self._made[kernel.identity] = [
                    (architecture, made)
                    for architecture in self.architectures
                    for made in self.compiler(kernel, architecture)
                ]
            name = self._names[kernel.identity]
            wrong += [
                f"{name} does not compile for sm_{architecture} ({made.configuration}): {made.error}"
                for architecture, made in self._made[kernel.identity]
                if made.error
            ]
        return wrong

    def totals(self, kernels: Iterable[Kernel] | None = None) -> Totals:
        """Over everything compiled, or over those of `kernels` that were."""
        wanted = self._made if kernels is None else {k.identity for k in kernels} & self._made.keys()
        made = [(key, one) for key in wanted for _, one in self._made[key] if not one.error]
        return Totals(
            kernels=len(wanted),
            binaries=len(made),
            most_registers=max((one.registers for _, one in made), default=0),
            most_shared=max((one.shared for _, one in made), default=0),
            spilling=tuple(sorted({self._names[key] for key, one in made if one.spilled})),
        )
