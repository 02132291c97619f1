"""What a kernel's machine code takes of a GPU: registers and local memory, as its ELF file says.

The assembler says the same while it works, but not of a kernel that lies in Triton's cache.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_REGISTERS, _FRAME = 0x2F, 0x11
"""EIATTR_REGCOUNT and EIATTR_FRAME_SIZE of the section ``.nv.info``, as ``readelf`` of CUDA's binary utilities names
them."""
_WITH_SIZE = 0x04
"""A format whose value is a number of bytes that follow; every other format is four bytes in all."""


class Needs(NamedTuple):
    """Of one thread: registers, and bytes of local memory, where it spills."""

    registers: int
    local: int


def needs(cubin: bytes) -> Needs:
    """What the largest function in a cubin needs.

    Raises:
        ValueError: `cubin` is no 64-bit ELF file with a section ``.nv.info``.
    """
    numbers: dict[int, int] = {_REGISTERS: 0, _FRAME: 0}
    for kind, value in _attributes(_section(cubin, b".nv.info")):
        if kind in numbers and len(value) == 8:
            numbers[kind] = max(numbers[kind], struct.unpack("<II", value)[1])  # the first is the function
    return Needs(numbers[_REGISTERS], numbers[_FRAME])


def _section(elf: bytes, wanted: bytes) -> bytes:
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError(f"a cubin is a 64-bit ELF file; got {len(elf)} bytes that begin with {elf[:5]!r}.")
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = heads[of_names][4]
    for name, _, _, _, at, length in heads:
        begin = names + name
        if elf[begin : elf.index(b"\0", begin)] == wanted:
            return elf[at : at + length]
    raise ValueError(f"the cubin has no section {wanted.decode()}.")


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(section):
        layout, kind, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if layout == _WITH_SIZE:
            yield kind, section[at : at + size]
            at += size
