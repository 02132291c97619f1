"""Which small kernels of a program can be launched as one: those of a kind that are ready while nothing large is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

N = TypeVar("N", bound=Hashable)


def launched_together(
    waits_for: Mapping[N, Collection[N]], kinds: Mapping[N, Hashable | None], most: int
) -> list[list[N]]:
    """Groups of nodes that may run at once, each as late as it can, so that many are ready together.

    Args:
        waits_for: By node, those that must have run before it; every node is a key.
        kinds: By node, its kind; None for one that is launched alone. A group has one kind.
        most: Nodes of a group.

    Returns:
        Groups of two nodes or more. No two nodes of a group wait for each other, and the groups can run one after the
        other: they are found in an order in which the whole program could run.

    Example:
        >>> launched_together({"a": [], "b": [], "c": ["a"], "d": ["b"]}, dict.fromkeys("abcd", "small"), most=8)
        [['a', 'b'], ['c', 'd']]
    """
    left = {node: len(set(needed)) for node, needed in waits_for.items()}
    users: dict[N, list[N]] = {node: [] for node in waits_for}
    for node, needed in waits_for.items():
        for before in set(needed):
            users[before].append(node)
    ready = deque(node for node, count in left.items() if not count)
    small: dict[Hashable, list[N]] = {}
    found: list[list[N]] = []

    def has_run(node: N) -> None:
        for user in users[node]:
            left[user] -= 1
            if not left[user]:
                ready.append(user)

    while ready or small:
        while ready:
            node = ready.popleft()
            if kinds[node] is None:
                has_run(node)
            else:
                small.setdefault(kinds[node], []).append(node)
        if small:
            together = small.pop(max(small, key=lambda kind: len(small[kind])))
            found += [together[at : at + most] for at in range(0, len(together), most)]
            for node in together:
                has_run(node)
    return [group for group in found if len(group) > 1]
