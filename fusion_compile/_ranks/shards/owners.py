"""Who owns which matrix: each is whole on one rank, and the work is spread evenly."""

from __future__ import annotations

from collections.abc import Mapping


def owners(costs: Mapping[str, float], ranks: int, load: list[float]) -> dict[str, int]:
    """The rank that owns each name: the dearest first, each to the rank that has least to do.

    All ranks compute the same. Nothing is padded: with fewer names than ranks some own none. `load`: what each of
    `ranks` has to do already; it is counted on.
    """
    found: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: -costs[n]):  # stable: equal ones in the order of the model
        least = min(range(ranks), key=lambda rank: load[rank])
        found[name] = least
        load[least] += costs[name]
    return {name: found[name] for name in costs}


def cost_of(shape: tuple[int, int]) -> float:
    """Multiplications of one step of Newton-Schulz on a matrix of `shape`, to compare matrices with each other."""
    short, long = sorted(shape)
    return float(2 * long * short**2 + short**3)
