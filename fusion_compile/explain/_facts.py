"""The nouns of an explanation: plain frozen data, one class for each object of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_compile.passes import Declined, PassReport

Status = Literal["good", "bad", "plain"]


@dataclass(frozen=True)
class SummaryLine:
    """One fact of the summary. `status`: whether it is what one wants, what one does not want, or neither."""

    label: str
    value: str
    status: Status = "plain"


@dataclass(frozen=True)
class Section:
    """A heading, column names and rows of text; numbers are aligned right."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Environment:
    """Where and when: `device` is the program's ("cpu", "cuda"), `roofline` the one whose peaks the times assume."""

    torch: str
    python: str
    device: str
    roofline: str
    date: str


@dataclass(frozen=True)
class NodeFacts:
    """One node of a graph.

    `module`: full name of the module it was called in; `where`: ``file:line`` of the user's source; both "" when the
    trace kept none. `dtype`, `shape`: of the (first) tensor it gives. `flops`: a multiply-add is two. `bytes_read`,
    `bytes_written`: 0 for views. `intensity`: flops a byte. `microseconds`: no device of the roofline's kind does it in
    less. `inputs`: indices of nodes. `binding_time`: in a sampler's graph. `finding`: index of one about this node.
    """

    name: str
    op: str
    region: str
    module: str
    where: str
    dtype: str
    shape: tuple[int | str, ...]
    flops: int
    bytes_read: int
    bytes_written: int
    intensity: float
    microseconds: float
    launches: int
    inputs: tuple[int, ...]
    binding_time: str | None = None
    finding: int | None = None


@dataclass(frozen=True)
class RegionFacts:
    """Sums over the calls of one region; `nodes` counts views too."""

    name: str
    nodes: int
    launches: int
    flops: int
    bytes: int
    microseconds: float


@dataclass(frozen=True)
class Alive:
    """A value that takes memory at the peak."""

    name: str
    bytes: int
    where: str


@dataclass(frozen=True)
class Memory:
    """`curve`: bytes alive while node i runs, inputs included, when the graph is run operator by operator; `peak_node`:
    index of the first node at its peak. `fused_peak_bytes`: an estimate for the graph when Inductor fuses it."""

    curve: tuple[int, ...]
    peak_bytes: int
    peak_node: int
    alive_at_peak: tuple[Alive, ...]
    fused_peak_bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """One graph. `edges`: ``(from region, to region, bytes)`` of the values that cross."""

    name: str
    regions: tuple[RegionFacts, ...]
    edges: tuple[tuple[str, str, int], ...]
    nodes: tuple[NodeFacts, ...]
    memory: Memory


@dataclass(frozen=True)
class PassFacts:
    """What a pass reported, and the graph before and after it, one line a node."""

    name: str
    exact: bool
    changed: int
    nodes_before: int
    nodes_after: int
    bytes_added: int
    declined: tuple[Declined, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @staticmethod
    def of(report: PassReport, before: Sequence[str], after: Sequence[str]) -> PassFacts:
        return PassFacts(**vars(report), before=tuple(before), after=tuple(after))


@dataclass(frozen=True)
class GraphBreak:
    """`stack`: the user's frames, outermost first, each ``file:line: source``."""

    reason: str
    where: str
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recompile:
    """`function`: what was compiled again. `guard`: the check that failed."""

    function: str
    guard: str
    where: str
    compile_id: str


@dataclass(frozen=True)
class Guard:
    text: str
    where: str


@dataclass(frozen=True)
class Kernel:
    """`nodes`: of the graph, by name; `where`: their lines in the user's source; `source`: the generated code."""

    name: str
    nodes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class FusionRefusal:
    first: str
    second: str
    reason: str


@dataclass(frozen=True)
class CudaGraphSkip:
    reason: str
    where: str


@dataclass(frozen=True)
class Rerecord:
    reason: str


@dataclass(frozen=True)
class CudaGraphs:
    captures: int = 0
    partitions: int = 0
    skips: tuple[CudaGraphSkip, ...] = ()
    rerecords: tuple[Rerecord, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A phase of compilation and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True)
class CacheUse:
    hits: int = 0
    misses: int = 0
    bypasses: int = 0


@dataclass(frozen=True)
class RuntimeFacts:
    """What happened when the program was compiled and run."""

    graph_breaks: tuple[GraphBreak, ...] = ()
    recompiles: tuple[Recompile, ...] = ()
    guards: tuple[Guard, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    fusion_refusals: tuple[FusionRefusal, ...] = ()
    cudagraphs: CudaGraphs = field(default_factory=CudaGraphs)
    phases: tuple[Phase, ...] = ()
    cache: CacheUse = field(default_factory=CacheUse)


Decision = Literal["hoisted", "recomputed", "live", "weight_kept", "weight_freed"]


@dataclass(frozen=True)
class HoistedValue:
    """One node or weight of a sampler's graph: when it is known, through which inputs, and what was made of that.

    `chain`: nodes from the earliest input that fixes its binding time down to itself. `frees_bytes`: of a weight that
    the loop no longer reads.
    """

    name: str
    kind: Literal["node", "parameter"]
    binding_time: str
    chain: tuple[str, ...]
    decision: Decision
    reason: str
    bytes: int
    flops: int
    frees_bytes: int


@dataclass(frozen=True)
class Hoisting:
    values: tuple[HoistedValue, ...]


def section(heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Section:
    """A `Section` from rows of anything; integers get thousands separators."""

    def text(cell: Any) -> str:
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    return Section(heading, tuple(columns), tuple(tuple(text(c) for c in row) for row in rows))
