"""Private API of Inductor: over which memory a kernel writes its result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


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
