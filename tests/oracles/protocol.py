"""What every slow twin offers. A twin imports nothing of fusion_compile: it judges it.

    oracle = Muon(start, spectral=("tall", "wide"), lr=0.02)
    grads = gradient_at(oracle.gradient_point())        # y of Schedule-Free, the weights themselves elsewhere
    oracle.step(grads)
    oracle.weights()                                    # deployable: x of Schedule-Free, the weights elsewhere

All arrays are numpy float64, one per name, updated in place, in a Python loop over the names. Hyperparameters are
plain attributes: `oracle.lr = 3e-4` holds from the next step on.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]
Tensors = dict[str, Array]
Given = Mapping[str, "Array | Tensor"]


class Oracle(Protocol):
    """A slow twin of a recipe."""

    lr: float

    def gradient_point(self) -> Tensors:
        """Copies of the point at which the next gradient belongs."""
        ...

    def step(self, grads: Given) -> None:
        """One update from one gradient per name, taken at `gradient_point()`."""
        ...

    def weights(self) -> Tensors:
        """Copies of the deployable weights."""
        ...


class BaseOracle(Oracle, Protocol):
    """A twin whose only iterate is `params`, so that Schedule-Free can use it as the sequence z."""

    params: Tensors


def float64_copies(given: Given) -> Tensors:
    """A float64 numpy copy of every tensor, torch or numpy, of any floating dtype."""
    return {name: _float64_copy(tensor) for name, tensor in given.items()}


def _float64_copy(tensor: "Array | Tensor") -> Array:
    if isinstance(tensor, Tensor):
        return np.array(tensor.detach().cpu().double().numpy(), dtype=np.float64)
    return np.array(tensor, dtype=np.float64)
