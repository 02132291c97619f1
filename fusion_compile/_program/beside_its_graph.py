"""A compiled function beside the graph that it was compiled from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BeforeFirst = Callable[[Callable[[], object], Callable[[], object]], None]
"""Called before a compiled function runs for the first time, with what runs its graph, and what runs the function, on
the same tensors."""
Around = Callable[[], contextlib.AbstractContextManager[object]]


class Beside(NamedTuple):
    """What is done about a compiled function beside its graph; see `BesideItsGraph`."""

    before_first: BeforeFirst
    around_each: Around = contextlib.nullcontext


class BesideItsGraph:
    """A compiled function that can run the graph that it was compiled from in its place.

    `before_first`: called before the compiled function runs for the first time, with what runs the graph, and what runs
    the function, on the same tensors; it may raise. `around_each`: gives what is around each run of either; it may
    raise, too. `compiled`: the compiled function alone.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        compiled: Callable[..., Any],
        before_first: BeforeFirst,
        around_each: Around = contextlib.nullcontext,
    ) -> None:
        self._graph: torch.fx.GraphModule | None = graph
        self.compiled = compiled
        self._before_first: BeforeFirst | None = before_first
        self._around_each = around_each
        self.runs_graph = False

    def __call__(self, *given: Any) -> Any:
        graph = self._graph
        if graph is not None and self.runs_graph:
            return self._run(graph, given)
        if graph is not None and self._before_first is not None:
            before, self._before_first = self._before_first, None
            before(lambda: self._run(graph, given), lambda: self._run(self.compiled, given))
        return self._run(self.compiled, given)

    def _run(self, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        with self._around_each():
            return function(*given)

    def forget_graph(self) -> None:
        """Run the compiled function alone from now on."""
        self._graph = None
