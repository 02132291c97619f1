"""What Inductor made of one captured graph, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Launch(NamedTuple):
    """One launch: the step's region that it works for (the latest), ``"triton"`` or ``"extern"``, its name, and the
    bytes that it reads and writes if it touches each entry once."""

    region: str
    kind: str
    name: str
    moved: int = 0


@dataclass
class Generated:
    """What Inductor made of one captured graph. Index lists are positions among a partition's inputs.

    Attributes:
        codes: The Python text of each graph that Inductor made; one, unless AOTAutograd cut the program.
        partitions: What torch would record as CUDA graphs: their inputs' names, static and written inputs.
        skips: Why no CUDA graph would be recorded, in torch's words.
        launches: By graph, in order.
        devices: Kinds of devices that the program uses.
    """

    codes: list[str] = field(default_factory=list)
    partitions: list[Partition] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)


class Partition(NamedTuple):
    """One CUDA graph's inputs by name, and which of them keep their address and which are written."""

    inputs: tuple[str, ...]
    static: frozenset[str]
    written: frozenset[str]
