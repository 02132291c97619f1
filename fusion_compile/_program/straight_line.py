"""A graph of few calls as one Python function, without fx's interpreter or a module's call between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from fusion_compile._program.kept_views import KeptViews
from fusion_compile.passes._compat import invoke_subgraph
from fusion_compile.passes._graph import is_view

Boxed = Callable[[list[Any]], Sequence[Any]]
"""A compiled region: takes its inputs in a list, which it empties as it goes on, so that each is freed after use."""


def straight_line(
    graph: fx.GraphModule, regions: Mapping[str, Boxed], *, stays: Callable[[fx.Node], bool] = lambda node: False
) -> Callable[..., Any]:
    """`graph` as a function of its inputs that calls `regions`, by name, where the graph invokes them.

    A value is dropped behind its last use; what a region uses last, inside of that region. `stays`: which inputs are
    the same tensors at nearly every call. Views of these are made once.
    """
    nodes = list(graph.graph.nodes)
    lines = _Lines(graph, regions, {node: f"v{at}" for at, node in enumerate(nodes)})
    kept = _views_of(nodes, stays)
    read = [node for node in nodes if node in kept and any(user not in kept for user in node.users)]
    bases = list(dict.fromkeys(node for node in nodes if node.op == "placeholder" and _used_by(node, kept)))
    views, first = lines.written(tuple(read)), ""
    if read:
        made = lines.function("views", bases, [node for node in nodes if node in kept], views, lives=read)
        first = f" {views} = {lines.constant(KeptViews(made))}({', '.join(map(lines.written, bases))})"
    inputs = [node for node in nodes if node.op == "placeholder"]
    rest = [node for node in nodes if node not in kept and node.op not in ("placeholder", "output")]
    result = lines.written(graph.graph.output_node().args[0])
    return lines.function("run", inputs, rest, result, first=first, lives=read)


def _views_of(nodes: Iterable[fx.Node], stays: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes that are views of inputs that stay."""
    found: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if is_view(node) and sources and all(s in found or (s.op == "placeholder" and stays(s)) for s in sources):
            found.add(node)
    return found


def _used_by(node: fx.Node, users: set[fx.Node]) -> bool:
    return any(user in users for user in node.users)


class _Lines:
    """Lines of Python for nodes of a graph."""

    def __init__(self, graph: fx.GraphModule, regions: Mapping[str, Boxed], names: Mapping[fx.Node, str]) -> None:
        self._graph, self._regions, self._names = graph, regions, names
        self._given: dict[str, Any] = {}

    def function(
        self,
        name: str,
        inputs: Sequence[fx.Node],
        nodes: Sequence[fx.Node],
        result: str,
        *,
        first: str = "",
        lives: Iterable[fx.Node] = (),
    ) -> Callable[..., Any]:
        """``name(*inputs)`` that runs `nodes` behind the line `first` and returns `result`. `lives`: what others
        hold."""
        held = {*lives, *self._graph.graph.output_node().all_input_nodes}
        last = {source: node for node in nodes for source in node.all_input_nodes if source not in held}
        over: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source.op != "get_attr":
                over.setdefault(node, []).append(source)
        unread = [node for node in nodes if node.op == "call_function" and not node.users]
        lines = [f"def {name}({', '.join(map(self.written, inputs))}):", *([first] if first else [])]
        for node in nodes:
            lines += self._lines(node, over.get(node, []), unread=node in unread)
        exec("\n".join([*lines, f" return {result}"]), self._given)
        made: Callable[..., Any] = self._given[name]
        return made

    def constant(self, value: Any) -> str:
        """A name for `value` in the functions."""
        name = f"c{len(self._given)}"
        self._given[name] = value
        return name

    def written(self, value: Any) -> str:
        """An argument of a node in Python."""
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self.written(one)}," for one in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        return self.constant(value)

    def _lines(self, node: fx.Node, over: Sequence[fx.Node], *, unread: bool) -> list[str]:
        own = self._names[node]
        freed = [f" del {', '.join(map(self.written, over))}"] if over else []
        after = [f" del {own}"] if unread else []
        if node.op == "get_attr":
            held = str(node.target) not in self._regions
            return [f" {own} = {self.constant(_attribute(self._graph, str(node.target)))}"] if held else []
        if node.target is invoke_subgraph:
            _, name, *given = node.args
            inputs = [f" a = {self.written(given)}", *freed]
            return [*inputs, f" {own} = {self.constant(self._regions[str(name)])}(a)", *after]
        if node.target is operator.getitem and isinstance(node.args[1], int):
            return [f" {own} = {self.written(node.args[0])}[{node.args[1]}]", *freed, *after]
        named = "".join(f", {key}={self.written(value)}" for key, value in node.kwargs.items())
        call = f"{self.constant(node.target)}({', '.join(map(self.written, node.args))}{named})"
        return [f" {own} = {call}", *freed, *after]


def _attribute(graph: fx.GraphModule, path: str) -> Any:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value
