"""A training step's graph in ATen operators -> the same graph with each region compiled by itself, and called directly.

Blocks that forward and backward repeat are one region each, compiled once, so that compile time does not grow with a
model's depth. What lies between them, and the optimizer with the writes of its results, are regions, too. Random
numbers are drawn between regions, by torch's own operators. Dynamo has no part in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fusion_compile._program._compat import is_higher_order
from fusion_compile._program.lower import lower_graph
from fusion_compile._program.program import REGIONS, CompiledRegion, region_of
from fusion_compile._program.shared_regions import SharedRegions
from fusion_compile._program.straight_line import Boxed, straight_line
from fusion_compile.passes import (
    count_launches,
    count_regions,
    fold_repeated_regions,
    outline_runs,
    outline_tail,
    write_into_joins,
)
from fusion_compile.passes._compat import invoke_subgraph
from fusion_compile.passes._graph import is_view

_BLOCKS = ("forward", "backward")
_KEEPS_VALUES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_JOINED = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)


@dataclass(frozen=True)
class ByRegion:
    """A compiled program. `run`: what the graph does, from the graph's inputs. `regions`: none where the graph was
    compiled as one, because an operator in it has graphs of its own."""

    run: Callable[..., Any]
    regions: tuple[CompiledRegion, ...]


def lower_by_region(
    graph: fx.GraphModule, inputs: Sequence[Tensor], shared: SharedRegions, *, mode: str, backend: str
) -> ByRegion:
    """Compile a copy of `graph`, captured by running a step, for `inputs`. `mode` must be one without CUDA graphs.

    `shared`: regions that other programs of the step have, compiled in the same mode by the same backend.

    Inputs whose ``meta["label"]`` does not begin with ``batch/`` are expected to be the same tensors at each call.
    Where one is not, or has moved, its views are made again.
    """
    if any(is_higher_order(node) for node in graph.graph.nodes):
        return ByRegion(lower_graph(graph, inputs, mode=mode, backend=backend), ())
    pieces = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    fold_repeated_regions(pieces, may_fold=_is_of_a_block, largest=True)
    repeated = count_regions(pieces)
    outline_tail(pieces, may_hold=lambda node: not (repeated and (_is_of_a_block(node) or _joins(node))))
    outline_runs(pieces, may_hold=lambda node: not (repeated and _joins(node)))
    _drop_dead_views(pieces.graph)
    if repeated:
        write_into_joins(pieces, is_join=_joins)
    counts = count_regions(pieces)
    regions: list[CompiledRegion] = []
    compiled: dict[str, Boxed] = {}
    for name, called in counts.items():
        region = pieces.get_submodule(name)
        assert isinstance(region, fx.GraphModule)
        described = CompiledRegion(
            name, called, name in repeated, count_launches(region), _parts(region), region in shared
        )
        regions.append(described)
        compiled[name] = shared.compiled(region)
    return ByRegion(straight_line(pieces, compiled, stays=_stays), tuple(regions))


def _stays(node: fx.Node) -> bool:
    """Whether an input is the same tensor at nearly every step, as all but the batch are."""
    return not str(node.meta.get("label", "batch/")).startswith("batch/")


def _drop_dead_views(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(lambda node: node.target is invoke_subgraph or node.is_impure())


def _is_of_a_block(node: fx.Node) -> bool:
    return region_of(node) in _BLOCKS


def _joins(node: fx.Node) -> bool:
    """Whether `node` makes a bank of gradients: its reads grow with depth, and so would a compiled loop for each."""
    if node.target not in _JOINED or _is_of_a_block(node):
        return False
    return any(_from_a_block(source) for source in node.all_input_nodes)


def _from_a_block(node: fx.Node) -> bool:
    while not _is_of_a_block(node) and (is_view(node) or node.target in _KEEPS_VALUES):
        node = node.all_input_nodes[0]
    return _is_of_a_block(node) or node.target is invoke_subgraph


def _parts(region: fx.GraphModule) -> tuple[str, ...]:
    found = {region_of(node) for node in region.graph.nodes if node.op == "call_function"}
    return tuple(part for part in REGIONS if part in found)
