"""Keys of the flat state: ``<section>/<rest>``. Everything that makes or reads a key does it here.

``params/<bank>``: the weights that the optimizer updates. ``module/<bank>``: the bank that the module's parameters
view, where it is other memory. ``mantissa/<bank>`` and ``compensation/<bank>``: what its rounding lost.
``point/<bank>``: the whole weights at which the loss is differentiated, where ranks divide what they are computed from.
``gradients/<bank>``: what ``.grad`` shows, where the step keeps it. ``optimizer/<path>``: the transform's state
(`flat_tree`). ``buffers/<name>``, ``carried/<label>`` (tensors that user code keeps in Python), ``metrics/<name>``,
``counts/<name>``, ``hyperparameters``, one tensor, and ``taken``, whether the last step was taken and not skipped.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusion_compile._types import Tensors

PARAMS, MODULE, OPTIMIZER = "params", "module", "optimizer"
MANTISSA, COMPENSATION = LOST = "mantissa", "compensation"
CARRIED, GRADIENTS, POINT = "carried", "gradients", "point"
BUFFERS, METRICS, COUNTS = "buffers", "metrics", "counts"
HYPERPARAMETERS, TAKEN = "hyperparameters", "taken"
"""The keys without a rest."""


def params(bank: str) -> str:
    return f"{PARAMS}/{bank}"


def module(bank: str) -> str:
    return f"{MODULE}/{bank}"


def mantissa(bank: str) -> str:
    return f"{MANTISSA}/{bank}"


def compensation(bank: str) -> str:
    return f"{COMPENSATION}/{bank}"


def gradients(bank: str) -> str:
    return f"{GRADIENTS}/{bank}"


def point(bank: str) -> str:
    return f"{POINT}/{bank}"


def optimizer(path: str) -> str:
    return f"{OPTIMIZER}/{path}"


def buffers(name: str) -> str:
    return f"{BUFFERS}/{name}"


def carried(path: str) -> str:
    return f"{CARRIED}/{path}"


def metrics(name: str) -> str:
    return f"{METRICS}/{name}"


def counts(name: str) -> str:
    return f"{COUNTS}/{name}"


def split(key: str) -> tuple[str, str]:
    """The inverse of the makers: ``"params/scalar/float32"`` -> ``("params", "scalar/float32")``."""
    section, _, rest = key.partition("/")
    return section, rest


def section(state: Mapping[str, Tensor], name: str) -> Tensors:
    """The entries of one section by the rest of their keys."""
    return {rest: t for key, t in state.items() for own, rest in [split(key)] if own == name and rest}


def of_group(at: int, state: Mapping[str, Tensor]) -> Tensors:
    """Group `at`'s flat state under keys that several groups can share: ``0/params/<bank>``."""
    return {f"{at}/{key}": t for key, t in state.items()}


def without_group(at: int, state: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `of_group`: group `at`'s entries under its own keys."""
    prefix = f"{at}/"
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
