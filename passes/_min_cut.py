"""Minimum cut of a directed graph with integer capacities (Dinic's algorithm)."""

from __future__ import annotations

from collections import deque

INFINITE = 1 << 60


class FlowNetwork:
    """Nodes are ints from `node()`; 0 is the source and 1 the sink."""

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]  # node -> indices into the two lists below; an edge's twin is index ^ 1
        self._to: list[int] = []
        self._capacity: list[int] = []

    def node(self) -> int:
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, start: int, end: int, capacity: int) -> None:
        for a, b, c in ((start, end, min(capacity, INFINITE)), (end, start, 0)):
            self._edges[a].append(len(self._to))
            self._to.append(b)
            self._capacity.append(c)

    def source_side(self) -> frozenset[int]:
        """The nodes on the source's side of a minimum cut; the smallest such set."""
        while True:
            levels = self._levels()
            if 1 not in levels:
                return frozenset(levels)
            pointer = [0] * len(self._edges)
            while self._augment(levels, pointer):
                pass

    def _levels(self) -> dict[int, int]:
        levels = {0: 0}
        queue = deque([0])
        while queue:
            at = queue.popleft()
            for e in self._edges[at]:
                if self._capacity[e] and self._to[e] not in levels:
                    levels[self._to[e]] = levels[at] + 1
                    queue.append(self._to[e])
        return levels

    def _augment(self, levels: dict[int, int], pointer: list[int]) -> bool:
        """Push flow along one shortest path; iterative, because graphs of models are thousands of nodes deep."""
        path: list[int] = []
        at = 0
        while at != 1:
            while pointer[at] < len(self._edges[at]):
                e = self._edges[at][pointer[at]]
                if self._capacity[e] and levels.get(self._to[e], -1) == levels[at] + 1:
                    break
                pointer[at] += 1
            else:
                if not path:
                    return False
                at = self._to[path.pop() ^ 1]
                pointer[at] += 1
                continue
            path.append(e)
            at = self._to[e]
        flow = min(self._capacity[e] for e in path)
        for e in path:
            self._capacity[e] -= flow
            self._capacity[e ^ 1] += flow
        return True
