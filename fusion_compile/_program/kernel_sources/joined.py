"""C++ kernels, each written as a file of its own -> a few files that hold all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_HEAD = re.compile(r"(?:[ \t]*(?:#(?!pragma\b).*|//.*)?\n)*")
"""The lines before a kernel: includes, definitions, comments."""
_NAME = re.compile(r"\bkernel\(")
_DIRECTIVE = re.compile(r"^[ \t]*#(?![ \t]*pragma\b)", re.MULTILINE)
MOST = 12
"""Kernels in a file. A compiler spends some 0.8 s on what every file includes and 0.1 to 0.3 s on a kernel, and the
files are compiled at the same time. It does not follow the number of cores, so that a cache may be taken along."""


@dataclass(frozen=True)
class Kernel:
    """A C++ function ``kernel`` and what it includes, as Inductor writes it; `types` are its arguments' in C++."""

    types: tuple[str, ...]
    source: str

    @property
    def head(self) -> str:
        found = _HEAD.match(self.source)
        return found.group(0) if found else ""

    @property
    def body(self) -> str:
        return self.source[len(self.head) :]

    def can_be_joined(self) -> bool:
        """Whether it is one function behind its includes, so that another name and other text around it change
        nothing."""
        body = self.body
        return len(_NAME.findall(body)) == 1 and body.count('extern "C"') == 1 and not _DIRECTIVE.search(body)

    def named(self, name: str) -> str:
        """The function as `name`, in a namespace of its own for what stands beside it."""
        return f"namespace of_{name} {{\n{_NAME.sub(f'{name}(', self.body)}\n}}\nusing of_{name}::{name};\n"


@dataclass(frozen=True)
class File:
    """Kernels that are compiled together: `at` are their positions among all, `kernels` themselves in this order."""

    at: tuple[int, ...]
    kernels: tuple[Kernel, ...]

    def names(self) -> tuple[str, ...]:
        return tuple(f"kernel_{n}" for n in range(len(self.kernels)))

    def source(self) -> str:
        """All of them in C++, one after the other."""
        heads = dict.fromkeys(kernel.head for kernel in self.kernels)
        named = zip(self.kernels, self.names(), strict=True)
        return "\n".join(heads) + "".join(kernel.named(name) for kernel, name in named)


def joined(kernels: Sequence[Kernel], most: int = MOST) -> list[File]:
    """Group `kernels` into files of at most `most`, of about equal length; one that cannot be joined is left out."""
    order = sorted(
        (n for n, kernel in enumerate(kernels) if kernel.can_be_joined()), key=lambda n: -len(kernels[n].source)
    )
    files = -(-len(order) // most)
    groups = [order[first::files] for first in range(files)]
    return [File(tuple(group), tuple(kernels[n] for n in group)) for group in groups if len(group) > 1]
