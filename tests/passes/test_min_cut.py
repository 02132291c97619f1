"""FlowNetwork: the cut has the least capacity there is."""

from __future__ import annotations

import itertools
import random

from fusion_compile.passes._min_cut import FlowNetwork


def test_the_cut_is_as_small_as_the_smallest_of_all_cuts() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        network = FlowNetwork()
        nodes = [0, 1, *(network.node() for _ in range(5))]
        edges = [(a, b, draw.randint(0, 9)) for a, b in itertools.permutations(nodes, 2) if draw.random() < 0.5]
        for edge in edges:
            network.edge(*edge)

        def weight(side: frozenset[int], edges: list[tuple[int, int, int]] = edges) -> int:
            return sum(c for a, b, c in edges if a in side and b not in side)

        found = network.source_side()
        inner = nodes[2:]
        sides = [frozenset((0, *s)) for k in range(len(inner) + 1) for s in itertools.combinations(inner, k)]
        assert 0 in found and 1 not in found
        assert weight(found) == min(map(weight, sides))
