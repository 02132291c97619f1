"""Private API of Inductor: the order in which it runs the nodes of a graph."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx

_ORDER = "torch._inductor.fx_passes.control_dependencies"

Order = Callable[[fx.Graph], Mapping[fx.Node, fx.Node]]
"""From a graph as Inductor will schedule it to pairs of nodes: the first runs after the second."""


@contextlib.contextmanager
def inductor_orders(order: Order) -> Iterator[None]:
    """Inside, Inductor schedules and fuses no node before the one that `order` puts it after.

    A pass that users gave Inductor (``post_grad_custom_post_pass``) runs before. Where torch has no such dependencies,
    nothing happens.
    """
    if importlib.util.find_spec(_ORDER) is None:
        yield
        return
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    preserve = importlib.import_module(_ORDER).preserve_node_ordering
    given: Any = config.post_grad_custom_post_pass
    users = given if isinstance(given, tuple) else () if given is None else (given,)

    class Ordered(CustomGraphPass):  # type: ignore[misc, unused-ignore]
        def __call__(self, graph: fx.Graph) -> None:
            for theirs in users:
                theirs(graph)
            preserve(graph, {node: [after] for node, after in order(graph).items()})

        def uuid(self) -> Any:
            # None, which a user's plain function gives, bypasses the cache.
            theirs = [getattr(user, "uuid", lambda: None)() for user in users]
            return None if None in theirs else (*theirs, get_hash_for_files((__file__, inspect.getfile(order))))

    with config.patch(post_grad_custom_post_pass=Ordered()):
        yield
