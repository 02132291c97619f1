"""The memory of each node's result in a graph: its size, its first node and its last."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor, fx

from fusion_compile.explain._graph.costs import is_alias, mutated, number
from fusion_compile.passes._graph import value_of

_BLOCK = 512
"""torch's CUDA allocator rounds up to multiples of this many bytes."""

Held = tuple[fx.Node, int]
"""A piece of memory, by the node that allocated it and the number of the result."""


class Lifetimes:
    """The memory of every node of a graph.

    `held`: memory that each node's result lies in. `made`: memory that the node allocates. `inputs`: memory of the
    graph's inputs. `sizes`: in bytes.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = nodes
        self.sizes: dict[Held, int] = {}
        self.made: dict[fx.Node, list[Held]] = {}
        self.start: dict[Held, int] = {}
        self.inputs: set[Held] = set()
        self.ends: dict[Held, int] = {}
        self.held: dict[fx.Node, tuple[Held, ...]] = {}
        for i, node in enumerate(nodes):
            self.held[node] = self._held(node, i)

    def _held(self, node: fx.Node, at: int) -> tuple[Held, ...]:
        if node.op == "call_function":
            if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                source, item = self.held[node.args[0]], (node.args[0], node.args[1])
                own = item in self.sizes or value_of(node) is None
                return tuple(m for m in source if m == item) if own else source
            if written := mutated(node):
                return tuple(m for n in written for m in self.held[n])
            if is_alias(node) and node.all_input_nodes:
                return self.held[node.all_input_nodes[0]]
        value = value_of(node)
        items = value if isinstance(value, (tuple, list)) else (value,)
        given = [(node, i) for i, item in enumerate(items) if isinstance(item, Tensor)]
        for memory in given:
            self.sizes[memory] = _allocated(items[memory[1]])
            self.start[memory] = at
        self.made[node] = given
        if node.op in ("placeholder", "get_attr"):
            self.inputs.update(given)
        return tuple(given)

    def last_use(self, output: fx.Node) -> dict[Held, int]:
        """Return, for memory that does not outlive the graph, the index of the node after which it is free."""
        for i, node in enumerate(self.nodes):
            for memory in (*self.held[node], *(m for n in node.all_input_nodes for m in self.held[n])):
                self.ends[memory] = i
        kept = {m for n in output.all_input_nodes for m in self.held[n]} | self.inputs
        for memory in kept:
            self.ends.pop(memory, None)
        return self.ends


def _allocated(tensor: Tensor) -> int:
    """Return the bytes that a new `tensor` takes."""
    size = 1 + sum((number(n) - 1) * number(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    count = 0 if any(number(n) == 0 for n in tensor.shape) else size * tensor.element_size()
    return -(-count // _BLOCK) * _BLOCK if tensor.device.type == "cuda" else count
