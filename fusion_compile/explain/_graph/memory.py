"""The memory that a graph holds while each of its nodes runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import fx

from fusion_compile.explain._facts import Alive, Memory
from fusion_compile.explain._graph.fused_memory import fused_peak
from fusion_compile.explain._graph.lifetimes import Lifetimes

_LISTED = 40


def memory_of(module: fx.GraphModule, nodes: Sequence[fx.Node], names: Mapping[fx.Node, tuple[str, str]]) -> Memory:
    """Sum up the memory over `nodes`, those of `module` except its output. `names`: name and source line of each.

    The model is a run operator by operator, as in eager PyTorch and ``aot_eager``. Each result has its own memory until
    its last reader is done. Views and in-place writes share the memory of their input. Inputs and weights belong to the
    caller and stay. Scratch memory inside an operator is not seen. Inductor fuses operators and gives many values no
    memory, so its peak is lower, or at most slightly higher.
    """
    lives = Lifetimes(nodes)
    alive = sum(lives.sizes[m] for m in lives.inputs)
    ends = defaultdict(list)
    last = len(nodes)
    for memory, end in lives.last_use(module.graph.output_node()).items():
        ends[end].append(memory)
    curve = []
    peak, peak_node = 0, 0
    for i, node in enumerate(nodes):
        alive += sum(lives.sizes[m] for m in lives.made.get(node, ()) if m not in lives.inputs)
        curve.append(alive)
        if alive > peak:
            peak, peak_node = alive, i
        alive -= sum(lives.sizes[m] for m in ends[i])
    at_peak = [
        m
        for m, size in lives.sizes.items()
        if size
        and (m in lives.inputs or lives.start[m] <= peak_node)
        and (m in lives.inputs or lives.ends.get(m, last) >= peak_node)
    ]
    at_peak.sort(key=lambda m: -lives.sizes[m])
    listed = [Alive(names[m[0]][0], lives.sizes[m], names[m[0]][1]) for m in at_peak[:_LISTED]]
    if rest := at_peak[_LISTED:]:
        listed.append(Alive(f"{len(rest)} smaller ones", sum(lives.sizes[m] for m in rest), ""))
    return Memory(tuple(curve), peak, peak_node, tuple(listed), fused_peak(module))
