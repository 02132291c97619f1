"""How much a watch compares, and when: a training step and a sampler owe different things."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scope:
    """Attributes:
    training: Compare what only a backward reads (requires_grad, backward hooks, hooks on tensors), tensors' shapes, and
        torch's modes and precision flags.
    new_attributes: Another attribute of a module, or of one of its tensors, is a change, whoever reads it.
    turns: Most values take turns, so that a call costs the same for a model of any size, and a change may be noticed
        some calls late. Otherwise modules and tensors' dtypes and devices are compared at each call.
    """

    training: bool = True
    new_attributes: bool = True
    turns: bool = True


STEP = Scope()
"""A change is an error, which must cost little and say how late it is."""
SAMPLER = Scope(training=False, new_attributes=False, turns=False)
"""A change makes new programs, so it must not be late, and what no trace can have read must not cause it. A weight that
was taken out of memory has another shape, and a call's key holds autocast."""
