"""The nouns of an explanation: plain frozen data, one class for each object of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_compile.passes import Declined, Finding, PassReport

SCHEMA = "fusion_compile.explanation"
VERSION = 2
"""Version of the JSON. It grows when a field changes its meaning or is removed; a new field does not change it."""

INPUT = "input"
"""The region of a graph's inputs: arguments, weights, state."""

Kind = Literal["training_step", "sampler", "exported_program", "graph_module", "callable"]
Status = Literal["good", "bad", "plain"]


@dataclass(frozen=True)
class SummaryLine:
    """One fact of the summary. `status`: "good" if it is wanted, "bad" if it is not, "plain" if it is neither."""

    label: str
    value: str
    status: Status = "plain"


@dataclass(frozen=True)
class Section:
    """A table of text: a heading, column names, rows."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Environment:
    """Where and when an explanation was made.

    `device`: the program's ("cpu", "cuda"). `roofline`: the device whose peak rates the times assume.
    """

    torch: str
    python: str
    device: str
    roofline: str
    date: str


@dataclass(frozen=True)
class NodeFacts:
    """One node of a graph.

    `module`: full name of the module that it was called in; "" if the trace kept none.
    `where`: ``file:line`` of the user's source; "" if the trace kept none.
    `dtype`, `shape`: of its result, or of the first tensor of several.
    `flops`: a multiply-add counts two.
    `bytes_read`, `bytes_written`: 0 for views.
    `intensity`: flops per byte.
    `microseconds`: lower bound on the roofline's device.
    `inputs`: indices of nodes.
    `binding_time`: in a sampler's graph only.
    `finding`: identity of a finding about this node, see `_findings.identity`.
    `recomputed`: number of the checkpointed region that the backward computes again with this node; 0 for other nodes.
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
    finding: str | None = None
    recomputed: int = 0


@dataclass(frozen=True)
class RegionFacts:
    """Sums over the calls of one region. `nodes` counts views too."""

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
    """Memory over one graph, in bytes.

    `curve`: alive while node i runs, inputs included, if the graph runs operator by operator.
    `peak_node`: index of the first node at the peak of `curve`.
    `fused_peak_bytes`: estimated peak if Inductor fuses the graph.
    """

    curve: tuple[int, ...]
    peak_bytes: int
    peak_node: int
    alive_at_peak: tuple[Alive, ...]
    fused_peak_bytes: int


@dataclass(frozen=True)
class CompiledPeak:
    """The highest point of memory of a compiled program, in bytes, predicted from what the compiler wrote.

    `program`: its name. `kept_bytes`: of it, what is there between two runs. `at`: the kernel or library call that is
    about to run. `alive`: what the program itself has allocated then, the largest first.
    """

    program: str
    bytes: int
    kept_bytes: int
    at: str
    alive: tuple[Alive, ...]


@dataclass(frozen=True)
class GraphFacts:
    """One graph. `edges`: ``(from region, to region, bytes)`` of the values that cross between regions."""

    name: str
    regions: tuple[RegionFacts, ...]
    edges: tuple[tuple[str, str, int], ...]
    nodes: tuple[NodeFacts, ...]
    memory: Memory


@dataclass(frozen=True)
class PassFacts:
    """The report of a pass, and the graph before and after it, one line a node."""

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
    """A place where Dynamo stopped tracing. `stack`: the user's frames, outermost first, each ``file:line: source``."""

    reason: str
    where: str
    stack: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recompile:
    """A second compilation of `function`. `guard`: the check that failed."""

    function: str
    guard: str
    where: str
    compile_id: str


@dataclass(frozen=True)
class Guard:
    """A check that must hold for the compiled code to be used again."""

    text: str
    where: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that runs. `nodes`: names of the graph's nodes that it computes. `where`: their lines in the user's
    source. `source`: the generated code."""

    name: str
    nodes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class FusionRefusal:
    """Two operators that Inductor did not fuse, and its reason."""

    first: str
    second: str
    reason: str


@dataclass(frozen=True)
class CudaGraphSkip:
    """A CUDA graph that torch did not record."""

    reason: str
    where: str


@dataclass(frozen=True)
class Rerecord:
    """A CUDA graph that torch recorded again."""

    reason: str


@dataclass(frozen=True)
class CudaGraphs:
    """Counts of recorded CUDA graphs and partitions, and every skip and repeated recording."""

    captures: int = 0
    partitions: int = 0
    skips: tuple[CudaGraphSkip, ...] = ()
    rerecords: tuple[Rerecord, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A phase of compilation and its duration."""

    name: str
    seconds: float


@dataclass(frozen=True)
class CacheUse:
    """Use of the caches of compiled graphs."""

    hits: int = 0
    misses: int = 0
    bypasses: int = 0


@dataclass(frozen=True)
class RuntimeFacts:
    """Events and results of compiling and running the program."""

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
    """One node or weight of a sampler's graph: its binding time, and the decision that followed from it.

    `chain`: nodes from the earliest input that fixes the binding time down to the value itself.
    `frees_bytes`: size of a weight that the loop no longer reads; else 0.
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
    """The decisions about every node and weight of a sampler's graphs."""

    values: tuple[HoistedValue, ...]


@dataclass(frozen=True)
class ExplanationFacts:
    """Everything that `explain` found about a program. `Explanation` adds the methods that show it."""

    title: str
    kind: Kind
    environment: Environment
    summary: tuple[SummaryLine, ...] = ()
    findings: tuple[Finding, ...] = ()
    sections: tuple[Section, ...] = ()
    graphs: tuple[GraphFacts, ...] = ()
    passes: tuple[PassFacts, ...] = ()
    runtime: RuntimeFacts | None = None
    hoisting: Hoisting | None = None
    notes: tuple[str, ...] = ()
    peaks: tuple[CompiledPeak, ...] = ()


def section(heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Section:
    """Make a `Section` from rows of any objects. Integers get thousands separators."""

    def text(cell: Any) -> str:
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    return Section(heading, tuple(columns), tuple(tuple(text(c) for c in row) for row in rows))
