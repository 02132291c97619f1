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
    """One configuration of one kernel as machine code. `registers` of a thread, `spilled` and `shared` in bytes."""

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


@dataclass
class Compilation:
    """Kernels compiled for several architectures; a kernel that another program had already is not compiled again.

    `failed`: a sentence for each kernel that no compiler took. `most_registers`, `most_shared` (bytes) and `spilling`
    (kernels with a configuration that spills) are over everything compiled.
    """

    architectures: Sequence[int]
    compiler: Compiler
    kernels: int = 0
    binaries: int = 0
    most_registers: int = 0
    most_shared: int = 0
    spilling: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _seen: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kernels: Iterable[Kernel]) -> list[str]:
        """Compile what is new. Return the sentences of those among `kernels` that do not compile."""
        wrong = []
        for kernel in kernels:
            if kernel.identity not in self._seen:
                self._seen[kernel.identity] = self._compile(kernel)
                self.failed += self._seen[kernel.identity]
            wrong += self._seen[kernel.identity]
        return wrong

    def _compile(self, kernel: Kernel) -> list[str]:
        self.kernels += 1
        wrong = []
        for architecture in self.architectures:
            for made in self.compiler(kernel, architecture):
                if made.error:
                    wrong.append(
                        f"{kernel.name} does not compile for sm_{architecture} ({made.configuration}): {made.error}"
                    )
                    continue
                self.binaries += 1
                self.most_registers = max(self.most_registers, made.registers)
                self.most_shared = max(self.most_shared, made.shared)
                if made.spilled and kernel.name not in self.spilling:
                    self.spilling.append(kernel.name)
        return wrong
