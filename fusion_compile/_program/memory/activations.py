"""Which activations a step keeps for its backward, and which it computes again there.

``torch.compile(model)`` cuts forward and backward apart, and where it cuts it chooses what to keep: a GELU's result is
computed again from the product before it. A step whose backward is traced is one graph that nobody cuts, so nothing
would be chosen. Here the same choice is made in that graph: the nodes that are not kept are copied into the backward,
and each copy waits for the gradient that meets it there. Without that wait a compiler would fuse it with its original.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from functools import partial

import torch
from torch import fx

from fusion_compile._program.memory._compat import can_choose, fuses, in_memory, saved_values
from fusion_compile._program.program import region_of
from fusion_compile._program.recomputation import region_of_recomputed, waits_for_gradient

_MARK = "again"
_SHARE: ContextVar[float | None] = ContextVar("share", default=None)


@contextlib.contextmanager
def activations_kept(share: float | None) -> Iterator[None]:
    """Inside, a program that is compiled keeps this share of its activations; None keeps all that are read."""
    before = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(before)


def share_kept() -> float | None:
    """What `activations_kept` was given."""
    return _SHARE.get()


def compute_again(graph: fx.Graph, budget: float) -> int:
    """Copy into the backward what it should not read from the forward; how many nodes were copied.

    `graph`: a step in ATen operators that writes nothing before its end, with its regions marked. `budget`: 1 computes
    again what is next to free; with less, only that share of the activations is kept, counted from there down to the
    inputs alone. A graph with symbolic sizes is left alone.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    own = {n for n in nodes if region_of(n) == "backward" or region_of_recomputed(n)}
    if not own or not can_choose() or any(isinstance(n.meta.get("val"), torch.SymInt) for n in nodes):
        return 0
    backward = _behind(nodes, own)
    forward = {n for n in nodes if n.op == "call_function" and region_of(n) == "forward" and n not in backward}
    needed = _ahead(nodes, own, forward)
    of_interest = [n for n in nodes if n in needed or n in own]
    kept = saved_values(of_interest, forward & needed, own, budget)
    copies: dict[fx.Node, fx.Node] = {}
    for reader in [n for n in nodes if n in own]:
        for source in reader.all_input_nodes:
            if source in forward and source not in kept:
                with graph.inserting_before(reader):
                    copy = _copied(graph, source, forward - kept, copies)
                reader.replace_input_with(source, copy)
    _give_memory(graph, copies.values())
    return len(copies)


def _behind(nodes: Sequence[fx.Node], own: Collection[fx.Node]) -> set[fx.Node]:
    """`own` and all that depends on it."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _ahead(nodes: Sequence[fx.Node], own: Collection[fx.Node], forward: Collection[fx.Node]) -> set[fx.Node]:
    """What `own` reads and all that leads there through `forward`."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node not in own and any(user in own or (user in found and user in forward) for user in node.users):
            found.add(node)
    return found


def _copied(graph: fx.Graph, node: fx.Node, again: Collection[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The copy of `node`, where the graph is being written; what it reads is copied before it."""
    waiting = [node]
    while waiting:
        last = waiting[-1]
        missing = [s for s in last.all_input_nodes if s in again and s not in copies]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        if last not in copies:
            copy = graph.node_copy(last, lambda source: copies.get(source, source) if source in again else source)
            copy.meta = {**last.meta, "custom": {**(last.meta.get("custom") or {}), "region": "backward", _MARK: True}}
            copies[last] = copy
    return copies[node]


def _is_again(node: fx.Node) -> bool:
    return bool((node.meta.get("custom") or {}).get(_MARK))


def _give_memory(graph: fx.Graph, copies: Collection[fx.Node]) -> None:
    """Let what a library's kernel reads of the copies have memory of its own there, which can then wait."""
    op = in_memory()
    for copy in list(copies):
        if _is_view(copy) or not fuses(copy) or not isinstance(copy.meta.get("val"), torch.Tensor):
            continue
        if not any(not fuses(reader) for reader in _readers(copy)):
            continue
        with graph.inserting_after(copy):
            placed = graph.call_function(op, (copy,))
        placed.meta = dict(copy.meta)
        copy.replace_all_uses_with(placed, delete_user_cb=partial(operator.is_not, placed))


def waits_in_the_backward(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """What is computed again, by checkpointing or to save memory, and the gradient that each waits for."""
    return waits_for_gradient(graph) | waits_to_be_needed(graph)


def waits_to_be_needed(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each copy that gets memory, the gradient that the first node that needs it reads besides."""
    nodes = list(graph.nodes)
    if not any(map(_is_again, nodes)):
        return {}
    position = {node: i for i, node in enumerate(nodes)}
    op = in_memory()
    found: dict[fx.Node, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        if not _is_again(node):
            continue
        readers = [first.get(user, user) if _is_again(user) else user for user in node.users]
        if not readers:
            continue
        first[node] = min(readers, key=position.__getitem__)
        gradient = _gradient_at(first[node], nodes, position) if node.target is op or not fuses(node) else None
        if gradient is not None:
            found[node] = gradient
    return found


def _gradient_at(reader: fx.Node, nodes: Sequence[fx.Node], position: dict[fx.Node, int]) -> fx.Node | None:
    """What `reader`, or else the nearest node before it, has of the backward itself."""
    for source in reader.all_input_nodes:
        while _is_view(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if _is_of_the_backward(source):
            return source
    return next((n for n in reversed(nodes[: position[reader]]) if _is_of_the_backward(n)), None)


def _is_of_the_backward(node: fx.Node) -> bool:
    own = node.op == "call_function" and region_of(node) == "backward"
    return own and not _is_again(node) and not region_of_recomputed(node) and not _is_view(node)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, also through views."""
    for user in node.users:
        if user.op == "call_function" and _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))
