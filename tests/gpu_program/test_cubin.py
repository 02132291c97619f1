"""Registers and local memory are read from a kernel's ELF file."""

from __future__ import annotations

import struct

import pytest

from fusion_compile._gpu_program.cubin import Needs, needs


def elf(info: bytes, name: bytes = b".nv.info") -> bytes:
    """A 64-bit ELF file with two sections: their names, and `info`."""
    names = b"\0" + name + b"\0.shstrtab\0"
    head = bytearray(64)
    head[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", head, 0x28, 64 + len(names) + len(info))
    struct.pack_into("<HHH", head, 0x3A, 64, 2, 1)
    sections = [(1, 0, 0, 0, 64 + len(names), len(info)), (1 + len(name) + 1, 3, 0, 0, 64, len(names))]
    return bytes(head) + names + info + b"".join(struct.pack("<IIQQQQ", *s) + bytes(24) for s in sections)


def of_function(kind: int, value: int) -> bytes:
    return struct.pack("<BBHII", 4, kind, 8, 7, value)


def test_the_largest_function_counts_and_other_attributes_are_passed_over() -> None:
    info = of_function(0x2F, 40) + struct.pack("<BBH", 3, 0x1B, 255) + of_function(0x11, 16)
    info += struct.pack("<BBHI", 4, 0x37, 4, 1) + of_function(0x2F, 64) + of_function(0x11, 0)
    assert needs(elf(info)) == Needs(registers=64, local=16)


@pytest.mark.parametrize(
    ("given", "sentence"), [(b"#!/bin/sh", "64-bit ELF"), (elf(b"", b".text"), "no section .nv.info")]
)
def test_what_is_no_cubin_is_refused(given: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        needs(given)
