"""A compiled function beside the graph that it was compiled from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BeforeFirst = Callable[[Callable[[], object]], None]
"""Called before a compiled function runs for the first time, with what runs its graph on the same tensors."""


class BesideItsGraph:
    """A compiled function that can run the graph that it was compiled from in its place.

    `before_first`: called before the compiled function runs for the first time, with what runs the graph on the same
    tensors; it may raise.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        compiled: Callable[..., Any],
        before_first: BeforeFirst,
    ) -> None:
        self._graph: torch.fx.GraphModule | None = graph
        self._compiled = compiled
        self._before_first: BeforeFirst | None = before_first
        self.runs_graph = False

    def __call__(self, *given: Any) -> Any:
        graph = self._graph
        if graph is None:
            return self._compiled(*given)
        if self.runs_graph:
            return graph(*given)
        if self._before_first is not None:
            before, self._before_first = self._before_first, None
            before(lambda: graph(*given))
        return self._compiled(*given)

    def forget_graph(self) -> None:
        """Run the compiled function alone from now on."""
        self._graph = None
