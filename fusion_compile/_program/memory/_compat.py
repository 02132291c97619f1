"""Private API of AOTAutograd's partitioner: which values of a forward its backward should keep; and of Inductor: a
value that gets memory where it stands, and over which memory a kernel writes its result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fusion_compile.passes._graph import impurity

_NEEDED = ("NodeInfo", "choose_saved_values_set", "get_default_op_list")


def can_choose() -> bool:
    """Whether this torch has the partitioner's choice where it is looked for."""
    try:
        from torch._functorch import partitioners
        from torch.utils._ordered_set import OrderedSet  # noqa: F401
    except ImportError:
        return False
    return all(hasattr(partitioners, name) for name in _NEEDED)


def saved_values(
    nodes: Sequence[fx.Node], forward: Collection[fx.Node], backward: Collection[fx.Node], budget: float
) -> set[fx.Node]:
    """The nodes whose values the backward should read from the forward, as torch.compile's partitioner chooses them.

    Args:
        nodes: Of a graph, in order; each has a value.
        forward: Those that may be computed again. What is neither in here nor in `backward` is there anyway.
        backward: Those that cannot run in the forward.
        budget: Between 0 (keep least) and 1 (compute again what costs next to nothing).
    """
    from torch._functorch import partitioners
    from torch.utils._ordered_set import OrderedSet

    before = [n for n in nodes if n not in backward]
    given = [n for n in before if n not in forward]
    for node in reversed(nodes):
        _mark(node, 0 if node in backward else min([10**9, *(_distance(user) + 1 for user in node.users)]))
    order = {node: i for i, node in enumerate(before)}
    free = OrderedSet(given)
    behind = OrderedSet(backward)
    info = partitioners.NodeInfo(
        [n for n in given if n.op == "placeholder"], OrderedSet(before), behind, behind, OrderedSet(), order, free
    )
    graph: Any = SimpleNamespace(nodes=list(nodes), owning_module=None)
    once = set(filter(_must_not_run_again, forward))
    with _kept([*(n for n in given if n.op == "call_function"), *once]):
        chosen = partitioners.choose_saved_values_set(graph, info, memory_budget=budget)
    return {*chosen, *once}


def _mark(node: Any, distance: int) -> None:
    node.dist_from_bw = distance


def _distance(node: Any) -> int:
    return getattr(node, "dist_from_bw", 10**9)


@contextlib.contextmanager
def _kept(nodes: Collection[fx.Node]) -> Iterator[None]:
    """Inside, the partitioner keeps these nodes if it needs them."""
    before = [(node, node.meta.get("recompute")) for node in nodes]
    for node in nodes:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        for node, policy in before:
            if policy is None:
                node.meta.pop("recompute", None)
            else:
                node.meta["recompute"] = policy


def _must_not_run_again(node: fx.Node) -> bool:
    """Whether a second run of `node` could give or do something else: it draws, writes, or is no plain operator."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return not (callable(op) and getattr(op, "__module__", "") == "_operator")
    return impurity(node) is not None or "inductor_random" in str(op) or "inductor_seed" in str(op)


def fuses(node: fx.Node) -> bool:
    """Whether Inductor can compute `node` within another kernel: it is elementwise, a view or a sum."""
    found: bool = _operators().is_fusible(node)
    return found


@functools.cache
def _operators() -> Any:
    from torch._functorch import partitioners

    return partitioners.get_default_op_list()


_LIBRARY: Any = torch.library.Library("fusion_compile", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
_LIBRARY.define("in_memory(Tensor x) -> Tensor")
_LIBRARY.impl("in_memory", lambda x: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("in_memory", lambda x: torch.empty_like(x), "Meta")


def in_memory() -> Any:
    """The operator by which a value gets memory where it stands in a graph for Inductor; it changes nothing else."""
    from torch._inductor import lowering

    op = torch.ops.fusion_compile.in_memory.default
    if op not in lowering.lowerings:

        @lowering.register_lowering(op, type_promotion_kind=None)
        def realized(x: Any) -> Any:
            x.realize()
            return x

    return op


@contextlib.contextmanager
def written_over_what_is_read_for_the_last_time() -> Iterator[None]:
    """Inside, a kernel of Inductor's writes its result over a tensor that it was given and that nobody reads any more.

    torch does so, but for two cases, both of which a whole step meets everywhere. A bank of weights is written at the
    end, so whatever was computed from a weight must have been computed before; torch counts that order as one more
    reader, and never writes over it. And a value that is computed once within a kernel (a tanh on a CPU) has a name and
    no memory; torch takes it for the first tensor to write over, and gives the result fresh memory. Where torch has
    moved what this replaces, nothing happens.
    """
    from torch._inductor import scheduler
    from torch.utils._ordered_set import OrderedSet

    node: Any = scheduler.BaseSchedulerNode
    theirs = getattr(node, "decide_inplace_update", None)
    if theirs is None or not hasattr(scheduler.Scheduler, "get_fused_node"):
        yield
        return

    def decide(self: Any) -> None:
        given = self.read_writes
        parts = self.scheduler.get_fused_node(self).get_nodes()
        inside = {buffer.get_name() for part in parts for buffer in part.get_outputs()}
        reads = sorted(given.reads, key=lambda read: read.name in inside)
        found = [self.scheduler.name_to_buf.get(read.name) for read in reads]
        buffers = {buffer.get_name(): buffer for buffer in found if buffer is not None}
        users = {name: buffer.users for name, buffer in buffers.items()}
        self.read_writes = dataclasses.replace(given, reads=OrderedSet(reads))
        for name, buffer in buffers.items():
            buffer.users = [user for user in buffer.users if not _only_comes_after(user, name)]
        try:
            theirs(self)
        finally:
            self.read_writes = given
            for name, buffer in buffers.items():
                buffer.users = users[name]

    node.decide_inplace_update = decide
    try:
        yield
    finally:
        node.decide_inplace_update = theirs


def _only_comes_after(user: Any, buffer: str) -> bool:
    """Whether `user` reads nothing of `buffer`, and only has to run after what made it."""
    if not getattr(user, "is_weak", False):
        return False
    uses = [dep for dep in user.node.read_writes.reads | user.node.read_writes.writes if dep.name == buffer]
    return bool(uses) and all(getattr(dep, "is_fake", False) for dep in uses)
