"""Compiled regions that the programs of a step share: what does not depend on the batch's shape is compiled once."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from torch import fx

from fusion_compile._program._compat import boxed
from fusion_compile._program.lower import lower_graph
from fusion_compile._program.program import recomputed_region, region_of
from fusion_compile._program.traced_strides import TracedStrides
from fusion_compile.passes._graph import value_of
from fusion_compile.passes._region import metadata, written


class SharedRegions:
    """Regions by what they compute, as long as a program has them. `mode` and `backend`: of all."""

    def __init__(self, mode: str, backend: str) -> None:
        self._mode, self._backend = mode, backend
        self._compiled: WeakValueDictionary[Any, TracedStrides] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._compiled)

    def __contains__(self, region: fx.GraphModule) -> bool:
        return _what(region) in self._compiled

    def compiled(self, region: fx.GraphModule) -> TracedStrides:
        """`region` compiled, or an equal one that was compiled before."""
        key = _what(region)
        if (known := self._compiled.get(key)) is not None:
            return known
        inputs = [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]
        results = [node.meta["val"] for node in region.graph.output_node().all_input_nodes]
        run = boxed(lower_graph(region, inputs, mode=self._mode, backend=self._backend))
        made = self._compiled[key] = TracedStrides(run, results)
        return made


def _what(region: fx.GraphModule) -> Any:
    """Equal for regions that compute the same, and of which a compiler makes the same: operators, constants, wiring,
    dtypes, shapes and strides, and to which part of the step each call belongs."""
    at = {node: i for i, node in enumerate(region.graph.nodes)}
    return tuple(
        ("input", metadata(value_of(node)))
        if node.op == "placeholder"
        else (written(node, at.__getitem__), metadata(value_of(node)), region_of(node), recomputed_region(node))
        for node in region.graph.nodes
    )
