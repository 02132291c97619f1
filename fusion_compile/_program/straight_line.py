"""A graph of few calls as one Python function, without fx's interpreter or a module's call between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fusion_compile.passes._compat import invoke_subgraph

Boxed = Callable[[list[Any]], Sequence[Any]]
"""A compiled region: takes its inputs in a list, which it empties as it goes on, so that each is freed after use."""


def straight_line(graph: fx.GraphModule, regions: Mapping[str, Boxed]) -> Callable[..., Any]:
    """`graph` as a function of its inputs that calls `regions`, by name, where the graph invokes them.

    A value is dropped behind its last use; what a region uses last, inside of that region.
    """
    names = {node: f"v{at}" for at, node in enumerate(graph.graph.nodes)}
    given: dict[str, Any] = {}

    def constant(value: Any) -> str:
        name = f"c{len(given)}"
        given[name] = value
        return name

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{written(one)}," for one in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        return constant(value)

    last = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}
    dead: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        dead.setdefault(node, []).append(source)
    inputs = graph.graph.find_nodes(op="placeholder")
    lines = [f"def run({', '.join(names[node] for node in inputs)}):"]
    for node in graph.graph.nodes:
        own, over = names[node], [names[n] for n in dead.get(node, ()) if n.op != "get_attr"]
        if node.op == "get_attr":
            if str(node.target) not in regions:
                lines.append(f" {own} = {constant(_attribute(graph, str(node.target)))}")
        elif node.op == "output":
            lines.append(f" return {written(node.args[0])}")
        elif node.target is invoke_subgraph:
            _, name, *given_to = node.args
            lines.append(f" a = {written(given_to)}")
            lines += [f" del {', '.join(over)}"] if over else []
            lines.append(f" {own} = {constant(regions[str(name)])}(a)")
        elif node.target is operator.getitem and not isinstance(node.args[1], fx.Node):
            lines.append(f" {own} = {written(node.args[0])}[{node.args[1]!r}]")
            lines += [f" del {', '.join(over)}"] if over else []
        elif node.op == "call_function":
            named = "".join(f", {key}={written(value)}" for key, value in node.kwargs.items())
            lines.append(f" {own} = {constant(node.target)}({', '.join(map(written, node.args))}{named})")
            lines += [f" del {', '.join(over)}"] if over else []
        if node.op == "call_function" and node not in last:
            lines.append(f" del {own}")
    exec("\n".join(lines), given)
    run: Callable[..., Any] = given["run"]
    return run


def _attribute(graph: fx.GraphModule, path: str) -> Any:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value
