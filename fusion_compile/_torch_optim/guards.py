"""Guards of modules whose parameters hold Schedule-Free's y: they say when y is evaluated or saved in the place of x.

They hang on the modules that own the parameters, because anybody may call or save a part of a model by itself, and only
while parameters hold y: hooks keep torch from its fast paths of inference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fusion_compile._say_once import SayOnce
from fusion_compile._torch_optim._compat import OnCompile
from fusion_compile._torch_optim.naming import alive_modules


class Guards:
    """The guards of one optimizer's modules. `warn`: how its warnings are given.

    `after_load`: a method that is called before the first forward after a module's weights were loaded while they hold
    y. `saves_averages`: somebody sees to it that models are saved at x, so the optimizer's state may be taken at y.
    """

    def __init__(self, warn: SayOnce, after_load: Callable[[], None], points: tuple[str, str]) -> None:
        self._warn = warn
        self._there, self._deployed = points
        self._after_load = weakref.WeakMethod(after_load)  # its owner holds the guards
        self._loaded = False
        self._watch = _Watch(self)
        self._guarded: set[int] = set()
        self._owners: list[weakref.ref[nn.Module]] = []
        self._handles: list[Any] = []
        self._compiles: OnCompile | None = None
        weakref.finalize(self, _take_off, self._handles)
        self.on = False
        self.saves_averages = False

    def cover(self, parameters: Mapping[str, nn.Parameter], model: nn.Module | None) -> None:
        """Guard the modules that own `parameters` too, looking for them in `model`, or among all modules alive."""
        new = {id(p) for p in parameters.values()} - self._guarded
        if not new:
            return
        self._guarded |= new
        known = {id(o) for o in self._modules()}
        owners = owners_of(new, model)
        owners = [m for m in (*owners, *compiled_around(owners)) if id(m) not in known]
        self._owners += [weakref.ref(m) for m in owners]
        if self.on:
            self._hang(owners)

    def switch(self, on: bool) -> None:
        """Hang the hooks up, or take them off."""
        if on is self.on:
            if self._compiles is not None:
                self._compiles.listen()
            return
        self.on = on
        if on:
            self._hang(self._modules())
            self._compiles = OnCompile(self._watch.on_compile)
            self._handles.append(self._compiles)
        else:
            self._compiles = None
            _take_off(self._handles)

    def evaluated(self, module: nn.Module) -> None:
        """A module's forward begins: warn if it is evaluated, that is, if no owner is in training mode.

        A layer alone in eval mode, such as a frozen BatchNorm, is no evaluation.
        """
        if module.training or self._warn.has_said("eval") or any(owner.training for owner in self._modules()):
            return
        self._warn(
            "eval",
            f"the model is evaluated (model.training is False) while the optimizer is in train mode: the weights are "
            f"{self._there}, not {self._deployed}. Call optimizer.eval() before, and optimizer.train() to go on.",
        )

    def compiled(self) -> None:
        """Somebody compiles: warn if it is the model to be evaluated, whose hooks compiled code leaves out.

        Whichever way it is compiled (``torch.compile(model)``, ``model.compile()``, a function that calls it), code for
        the eval mode is made when it is first evaluated.
        """
        if (owner := next(self._modules(), None)) is not None:
            self.evaluated(owner)

    def loaded(self) -> None:
        """A module's weights were loaded."""
        self._loaded = True

    def settle(self) -> None:
        """Call `after_load` once if weights were loaded."""
        if self._loaded:
            self._loaded = False
            if (after_load := self._after_load()) is not None:
                after_load()

    def saved(self, what: str) -> None:
        """The model's weights are about to be saved: warn. `what`: the subject of the sentence, with its verb."""
        self._warn(
            "saved",
            f"{what} in train mode: the model's weights are {self._there}, not {self._deployed}. Call "
            f"optimizer.eval() before saving the model, and optimizer.train() to go on.",
        )

    def _modules(self) -> Iterator[nn.Module]:
        return (m for ref in self._owners if (m := ref()) is not None)

    def _hang(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._watch))
            untyped: Any = module  # torch gives these two no types
            self._handles.append(untyped.register_state_dict_pre_hook(self._watch.on_state_dict))
            self._handles.append(untyped.register_load_state_dict_post_hook(self._watch.on_load))


class _Watch:
    """What hangs on modules. It knows the optimizer weakly, and a copy of the module has none."""

    def __init__(self, guards: Guards | None) -> None:
        self._guards = None if guards is None else weakref.ref(guards)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._guards is None:
            return
        if (guards := self._guards()) is not None:
            guards.settle()
            guards.evaluated(module)

    def on_compile(self) -> None:
        if self._guards is not None and (guards := self._guards()) is not None:
            guards.compiled()

    def on_load(self, module: nn.Module, incompatible: Any) -> None:
        if self._guards is not None and (guards := self._guards()) is not None:
            guards.loaded()

    def on_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self._guards is not None and (guards := self._guards()) is not None:
            guards.saved("the model's state_dict() was taken")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch(None)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._guards is not None and (guards := self._guards()) is not None:
            guards.saved("the model was pickled")
        return _Watch, (None,)


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def owners_of(parameters: set[int], model: nn.Module | None) -> list[nn.Module]:
    """The modules that own one of `parameters`, which are ids; of those `model` lacks, among all modules alive."""

    def owned(module: nn.Module) -> set[int]:
        # As torch.nn keeps them: named_parameters() may be the user's own.
        return {id(p) for p in (module.__dict__.get("_parameters") or {}).values()} & parameters

    found = [] if model is None else [m for m in model.modules() if owned(m)]
    if parameters - {i for m in found for i in owned(m)}:
        seen = {id(m) for m in found}
        found += [m for m in alive_modules() if id(m) not in seen and owned(m)]
    return found


def compiled_around(owners: Iterable[nn.Module]) -> list[nn.Module]:
    """What ``torch.compile`` made of modules that have `owners` in them. Their own hooks are part of the compiled code,
    and say nothing there."""
    ids = {id(m) for m in owners}
    wrapped = ((m, inner) for m in alive_modules() if isinstance(inner := _inside(m), nn.Module))
    return [m for m, inner in wrapped if any(id(part) in ids for part in inner.modules())]


def _inside(module: nn.Module) -> object:
    return (module.__dict__.get("_modules") or {}).get("_orig_mod")
