"""Small kernels that wait for each other are never launched as one; those of a kind that do not, mostly are."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping

from fusion_compile._program.launched_together import launched_together


def can_run(waits_for: Mapping[int, list[int]], groups: list[list[int]]) -> bool:
    """Whether a program whose groups are launched as one has an order."""
    launch_of = {node: i for i, group in enumerate(groups) for node in group}
    launches: dict[int, set[int]] = {}
    for node in waits_for:
        launches.setdefault(launch_of.setdefault(node, len(groups) + node), set()).add(node)
    done: set[int] = set()
    while len(done) < len(waits_for):
        ready = [nodes for nodes in launches.values() if not nodes & done]
        ready = [nodes for nodes in ready if all(done.issuperset(waits_for[node]) for node in nodes)]
        if not ready:
            return False
        done |= set().union(*ready)
    return True


def test_chains_of_several_banks_are_launched_in_as_many_rounds_as_a_chain_is_long() -> None:
    """Between a bank's small kernels stand large ones, more in one bank than in the other."""
    waits_for: dict[str, list[str]] = {"norm": []}
    kinds: dict[str, Hashable | None] = {"norm": "sum"}
    for bank, products in enumerate((2, 5, 3)):
        before = "norm"
        for step in range(3):
            small = f"small {bank} {step}"
            waits_for[small], kinds[small] = [before], "sum"
            for i in range(products):
                large = f"product {bank} {step} {i}"
                waits_for[large], kinds[large] = [small if i == 0 else before], None
                before = large
    groups = launched_together(waits_for, kinds, most=8)
    assert [set(group) for group in groups] == [{f"small {bank} {step}" for bank in range(3)} for step in range(3)]


def test_a_group_has_one_kind_and_at_most_so_many() -> None:
    waits_for: dict[int, list[int]] = {i: [] for i in range(10)}
    kinds = {i: "sum" if i < 7 else "entries" if i < 9 else None for i in range(10)}
    assert launched_together(waits_for, kinds, most=3) == [[0, 1, 2], [3, 4, 5], [7, 8]]


def test_whatever_waits_for_whatever_the_program_has_an_order_and_each_runs_once() -> None:
    draw, found = random.Random(0), 0
    for _ in range(200):
        size = draw.randint(1, 25)
        waits_for = {i: draw.sample(range(i), draw.randint(0, min(i, 3))) for i in range(size)}
        kinds = {i: draw.choice([None, "sum", "entries"]) for i in range(size)}
        order = draw.sample(range(size), size)
        groups = launched_together({i: waits_for[i] for i in order}, kinds, most=4)
        nodes = [node for group in groups for node in group]
        assert len(nodes) == len(set(nodes)) and all(2 <= len(group) <= 4 for group in groups)
        assert all(len({kinds[node] for node in group}) == 1 and kinds[group[0]] for group in groups)
        assert can_run(waits_for, groups)
        found += len(groups)
    assert found > 200, "and there are such groups"
