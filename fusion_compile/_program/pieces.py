"""An ATen graph -> the same graph with each region compiled by itself.

Blocks that a graph repeats are one region, compiled once, so compile time does not grow with a model's depth. Between
regions only views and single kernels run. Dynamo never walks the whole graph.
"""

from __future__ import annotations

import copy

from torch import fx, nn

from fusion_compile._program.lower import lower
from fusion_compile.passes import count_regions, fold_repeated_regions, outline_runs
from fusion_compile.passes._compat import invoke_subgraph


def compile_pieces(graph_module: fx.GraphModule, *, mode: str, backend: str) -> tuple[fx.GraphModule, dict[str, int]]:
    """Compile a copy of `graph_module`. Also return, for each block that it repeats, the number of calls by name.

    The result reads parameters and buffers where `graph_module` has them: one assigned there counts here. ``mode`` must
    be one without CUDA graphs: each piece would be a graph of its own.
    """
    pieces = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    pieces._parameters, pieces._buffers = graph_module._parameters, graph_module._buffers
    fold_repeated_regions(pieces)
    repeated = count_regions(pieces)
    outline_runs(pieces)
    for name in count_regions(pieces):
        compiled = lower(pieces.get_submodule(name), mode=mode, backend=backend)
        assert isinstance(compiled, nn.Module)
        setattr(pieces, name, compiled)
    graph = pieces.graph
    for node in graph.find_nodes(op="call_function", target=invoke_subgraph):
        _, name, *inputs = node.args
        with graph.inserting_before(node):
            call = graph.call_module(name, tuple(inputs))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    pieces.recompile()
    return pieces, repeated
