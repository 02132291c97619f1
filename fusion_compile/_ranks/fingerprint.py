"""What a captured program communicates, in the order in which it does: the same on every rank, or none runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from fusion_compile._ranks._compat import NAMESPACE
from fusion_compile._ranks.groups import Group


def collectives(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls that start a collective."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and NAMESPACE in str(node.target) and "wait_tensor" not in str(node.target):
            yield node


def fingerprint(graph: fx.GraphModule, groups: Mapping[str, Group]) -> tuple[str, ...]:
    """One line for each collective: what it does, of which shape and dtype, among how many ranks.

    Groups have other names on other ranks, so their sizes stand for them.
    """
    return tuple(_line(node, groups) for node in collectives(graph))


def traffic(graph: fx.GraphModule, groups: Mapping[str, Group]) -> list[tuple[str, int, int]]:
    """``(collective and number of ranks, how many, bytes that a rank sends)``, as rings send them."""
    found: dict[str, tuple[int, int]] = {}
    for node in collectives(graph):
        value, group = _given(node), groups.get(str(node.args[-1]))
        size, given = 1 if group is None else group.size, 0 if value is None else value.nbytes
        name = operation(node)
        whole = given * size if name.startswith("all_gather") else given
        sent = whole * (size - 1) // size * (2 if name.startswith("all_reduce") else 1)
        count, total = found.get(f"{name} among {size}", (0, 0))
        found[f"{name} among {size}"] = count + 1, total + sent
    return [(what, count, total) for what, (count, total) in found.items()]


def _given(node: fx.Node) -> Tensor | None:
    given = node.args[0]
    value = given.meta.get("val", given.meta.get("example_value")) if isinstance(given, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _line(node: fx.Node, groups: Mapping[str, Group]) -> str:
    value = _given(node)
    what = "tensors" if value is None else f"{[*value.shape]} {value.dtype}"
    group = groups.get(str(node.args[-1]))
    return f"{operation(node)} of {what} among {'others' if group is None else group.size}"


def operation(node: fx.Node) -> str:
    """``all_reduce``, ``reduce_scatter_tensor``, ``all_gather_into_tensor``."""
    name = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
    return name.rpartition("::")[2].rpartition(".")[2] or name
