"""A moving average of the weights that a training step or a torch optimizer keeps, and a module that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._state import keys
from fusion_compile._state.average_model import module_with, put_parameters, share_the_rest
from fusion_compile._state.banks import Layout
from fusion_compile._state.saved_averages import read_average
from fusion_compile._types import Tensors
from fusion_compile.optim.averaged import Average


class Counter(NamedTuple):
    """What the state has of an average besides its banks: updates taken, and the least weight of the next one."""

    taken: Tensor
    least: Tensor


class KeptAverage:
    """One average, which a step or a torch optimizer keeps in its state from when it is made with it.

    Attributes:
        average: How it follows the weights.
        names: The parameters that are averaged.
        counters: The counter in the state; of a torch optimizer one for each parameter group that took a step.
    """

    def __init__(self, average: Average, model: nn.Module | None) -> None:
        if not average.name.isidentifier():
            raise ValueError(f"EMA(name={average.name!r}) must be a word of letters, digits and underscores.")
        self.average, self._trained = average, model
        self._model: nn.Module | None = None
        self.names: frozenset[str] = frozenset()
        self.counters: dict[int, Counter] = {}
        self._waits = False
        self._versions: dict[str, int] = {}
        self._updates: int | None = None

    @property
    def model(self) -> nn.Module:
        """A copy of the model whose parameters are the average, in evaluation mode; always up to date.

        Its buffers, and its frozen parameters, are the trained model's own.

        Raises:
            RuntimeError: No step keeps this average yet.
        """
        if self._waits:
            self._copy_weights()
        if self._model is None:
            raise RuntimeError(
                "this EMA is not kept by any step yet; give it to compile_training_step(model, loss_fn, ema=ema) or to "
                "as_torch_optimizer(model, ema=ema)."
            )
        return self._model

    # ------------------------------------------------------------------ for those that keep it

    @property
    def trained(self) -> nn.Module:
        """The model that is trained."""
        assert self._trained is not None
        return self._trained

    def held_by(self, model: nn.Module, named: Tensors, counter: Counter | None = None) -> None:
        """For the step that keeps it: `named` are views of its memory by parameter name."""
        self._take(model, "compile_training_step()")
        # Each with a storage of its own: what is saved by storage is then that parameter and not the whole bank.
        own = {name: torch.from_dlpack(view) for name, view in named.items()}  # type: ignore[attr-defined]
        self._model = module_with(model, own).eval()
        self.names = frozenset(own)
        self.counters = {} if counter is None else {0: counter}

    def wait_for(self, model: nn.Module | None) -> None:
        """For the torch optimizer that keeps it from its first step on. Until then `model` is made of copies."""
        model = self._trained if model is None else model
        if model is None:
            raise ValueError(
                "ema= needs the module whose parameters are averaged, and the optimizer was given parameters only; "
                "give EMA(model), or the model as model=."
            )
        self._take(model, "as_torch_optimizer()")
        self._waits = True

    def _take(self, model: nn.Module, by: str) -> None:
        if self._trained is not None and self._trained is not model:
            raise ValueError(f"EMA(model) was given another model than {by}; give both the same one.")
        if self._model is not None or self._waits:
            raise ValueError("this EMA is kept by a step already; make another one, EMA(model, …).")
        self._trained = model

    def _copy_weights(self) -> None:
        """Before the first step: the weights as they are now, except what somebody has written into the copy."""
        trained = self.trained
        weights = {n: p.detach() for n, p in trained.named_parameters() if p.requires_grad and n not in self.names}
        if self._model is None:
            self._model = module_with(trained, {n: _fp32(w).clone() for n, w in weights.items()}).eval()
        else:
            share_the_rest(self._model, trained, {*self.names, *weights})
        written = self._written()
        put_parameters(self._model, trained, {n: _fp32(w).clone() for n, w in weights.items() if n not in written})
        copies = dict(self._model.named_parameters())
        self._versions = {n: self._versions[n] if n in written else copies[n]._version for n in weights}

    def _written(self) -> set[str]:
        """Names of the copies that somebody wrote before the first step, as a loaded average is."""
        if self._model is None:
            return set()
        own = dict(self._model.named_parameters())
        return {n for n, version in self._versions.items() if own[n]._version != version}

    def forget_written(self) -> None:
        """For the torch optimizer, which loads a checkpoint: what was written before the first step does not count."""
        if self._waits:
            self._versions, self._updates = {}, None

    def bind(self, at: int, named: Tensors, counter: Counter) -> None:
        """For the torch optimizer: group `at` keeps it in `named`, views by the model's parameter names, from now on.

        What somebody has written into the copies before is written there.
        """
        trained = self.trained
        if self._model is None:
            self._model = module_with(trained, {n: v.clone() for n, v in named.items()}).eval()
        given, copies = self._written() if self._waits else set(), dict(self._model.named_parameters())
        with torch.no_grad():
            for name in given & named.keys():
                named[name].copy_(copies[name])
        own = {name: torch.from_dlpack(view) for name, view in named.items()}  # type: ignore[attr-defined]
        put_parameters(self._model, trained, own)
        self._versions = {n: v for n, v in self._versions.items() if n not in named}
        self.names |= own.keys()
        self.counters[at] = counter
        share_the_rest(self._model, trained, {*self.names, *self._versions})
        if self._updates is not None:
            self._count(self._updates, counter)

    def bound(self) -> None:
        """For the torch optimizer: every group that keeps it has bound it."""
        self._waits, self._versions, self._updates = False, {}, None

    def say_written(self) -> None:
        """For the step: it has written the average, which caches of what was computed from it must notice."""
        if self._model is not None:
            torch.autograd.graph.increment_version(list(self._model.parameters()))

    # ------------------------------------------------------------------ what others kept

    def load_state_dict(self, saved: Any) -> None:
        """Go on from an average that another library kept of the same parameters.

        Args:
            saved: An object or its ``state_dict()``: diffusers' ``EMAModel``, timm's ``ModelEmaV2`` and ``ModelEmaV3``
                (and a checkpoint's ``state_dict_ema``), ``torch.optim.swa_utils.AveragedModel``, ema_pytorch's ``EMA``,
                or tensors by parameter name. Where it has a count of its updates, a warm-up goes on from there. The
                decay stays this EMA's own, and so do buffers.

        Raises:
            TypeError: It is no state of an average.
            ValueError: Names, shapes or the number of parameters differ; nothing is loaded.
        """
        own: Tensors = dict(self.model.named_parameters())
        averaged = self.names or frozenset(self._versions)
        found = read_average(saved, own, averaged, self.average)
        with torch.no_grad():
            for name in averaged:
                own[name].copy_(found.weights[name])
            if found.updates is not None:
                self._updates = found.updates if self._waits else None
                for counter in self.counters.values():
                    self._count(found.updates, counter)

    def _count(self, updates: int, counter: Counter) -> None:
        counter.taken.fill_(updates)
        counter.least.copy_(self.average.least(counter.taken + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "counters": {}}  # whoever keeps the copy binds it again

    def __repr__(self) -> str:
        kept = "kept by a step" if self._model is not None else "not kept by a step yet"
        return f"EMA({self.average.name!r}, {kept})"


def _fp32(weights: Tensor) -> Tensor:
    return weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights


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


def counter_of(average: Average, state: Mapping[str, Tensor]) -> Counter:
    """The counter of an average in a flat `state`."""
    return Counter(state[keys.optimizer("taken")], state[keys.optimizer(f"least/{average.name}")])
