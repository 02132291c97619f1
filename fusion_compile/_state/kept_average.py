"""A moving average of the weights that a training step keeps, and a module that shows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fusion_compile._state import keys
from fusion_compile._state.average_model import module_with
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors
from fusion_compile.optim.averaged import Average


class KeptAverage:
    """One average, which a step keeps in its state from when it is made with it.

    Attributes:
        average: How it follows the weights.
        names: The parameters that are averaged.
    """

    def __init__(self, average: Average, model: nn.Module | None) -> None:
        if not average.name.isidentifier():
            raise ValueError(f"EMA(name={average.name!r}) must be a word of letters, digits and underscores.")
        self.average, self._trained = average, model
        self._model: nn.Module | None = None
        self.names: frozenset[str] = frozenset()

    @property
    def model(self) -> nn.Module:
        """A copy of the model whose parameters are the average, in evaluation mode; always up to date.

        Its buffers, and its frozen parameters, are the trained model's own.

        Raises:
            RuntimeError: No step keeps this average yet.
        """
        if self._model is None:
            raise RuntimeError(
                "this EMA is not kept by any step yet; give it to compile_training_step(model, loss_fn, ema=ema)."
            )
        return self._model

    def held_by(self, model: nn.Module, named: Tensors) -> None:
        """For the step that keeps it: `named` are views of its memory by parameter name."""
        if self._trained is not None and self._trained is not model:
            raise ValueError("EMA(model) was given another model than compile_training_step(); give both the same one.")
        if self._model is not None:
            raise ValueError("this EMA is kept by a step already; make another one, EMA(model, …).")
        # Each with a storage of its own: what is saved by storage is then that parameter and not the whole bank.
        own = {name: torch.from_dlpack(view) for name, view in named.items()}  # type: ignore[attr-defined]
        self._model = module_with(model, own).eval()
        self.names = frozenset(own)

    def say_written(self) -> None:
        """For the step: it has written the average, which caches of what was computed from it must notice."""
        if self._model is not None:
            torch.autograd.graph.increment_version(list(self._model.parameters()))

    def __repr__(self) -> str:
        kept = "kept by a step" if self._model is not None else "not kept by a step yet"
        return f"EMA({self.average.name!r}, {kept})"


def averages_of(given: KeptAverage | Sequence[KeptAverage]) -> tuple[KeptAverage, ...]:
    """What ``ema=`` was given, as a tuple.

    Raises:
        TypeError: It is neither an `EMA` nor several.
        ValueError: Two have one name.
    """
    found = (given,) if isinstance(given, KeptAverage) else tuple(given)
    if odd := [each for each in found if not isinstance(each, KeptAverage)]:
        raise TypeError(f"ema={odd[0]!r} is a {type(odd[0]).__name__}; give an EMA, or several in a list.")
    names = [each.average.name for each in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two averages are called {min(twice)!r}; give each a name: EMA(model, name='slow').")
    return found


def parameters_of(averages: Sequence[KeptAverage]) -> Tensors:
    """The parameters of the averages' models, by a name of their own for each: ``ema.model.<name>``."""
    return {f"{a.average.name}.model.{n}": p for a in averages for n, p in a.model.named_parameters() if n in a.names}


def views_of(averages: Sequence[KeptAverage], layout: Layout, state: Tensors) -> Tensors:
    """What the same names have in a flat `state`."""
    return {
        f"{a.average.name}.model.{n}": v
        for a in averages
        for n, v in layout.views(banks_of(a.average, layout, state)).items()
    }


def banks_of(average: Average, layout: Layout, state: Tensors) -> Tensors:
    """The entries of an average in a flat `state`, by bank."""
    return {b.key: state[keys.optimizer(f"averages/{average.name}/{b.key}")] for b in layout.banks}
