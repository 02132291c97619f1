"""A step's state as one dictionary, keyed by full parameter name: made, checked as a whole, and put into place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._state import checkpoint_folder, keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.mismatches import mismatches, refuse_mismatches
from fusion_compile._state.named_state import named_state
from fusion_compile._state.random_state import RandomState
from fusion_compile._types import Tensors

_EXTRA = "_extra_state"
"""What ``nn.Module.get_extra_state()`` gives is called so in a ``state_dict()``."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the model's state_dict() is a {type(value).__name__}; a checkpoint holds tensors. Let "
                f"get_extra_state() return a tensor."
            )
    return tensors


def state_dict(
    model: nn.Module, layout: Layout, state: Tensors, hyperparameters: Hyperparameters, steps_called: int
) -> dict[str, Any]:
    """Copy everything that a resumed run needs, apart from what user code keeps.

    ``buffers``: those that the loss changes and ``model`` lacks.
    """
    sections = {**sections_of(model, layout, state), "optimizer": named_state(layout, state)}
    return {
        **{section: {n: t.detach().clone() for n, t in named.items()} for section, named in sections.items()},
        "hyperparameters": hyperparameters.state_dict(),
        "steps_called": steps_called,
    }


def sections_of(model: nn.Module, layout: Layout, state: Tensors) -> dict[str, Tensors]:
    """The model's tensors, counts and buffers, not copied, and the random state."""
    tensors = model_tensors(model)
    return {
        "model": tensors,
        "counts": keys.section(state, keys.COUNTS),
        "buffers": {n: t for n, t in keys.section(state, keys.BUFFERS).items() if n not in tensors},
        "rng": RandomState.now(layout.device),
    }


def load_state_dict(
    saved: Mapping[str, Any],
    model: nn.Module,
    layout: Layout,
    state: Tensors,
    hyperparameters: Hyperparameters,
    agreed: Callable[[], None] | None = None,
) -> int:
    """Check everything, then copy everything into place. Returns the number of calls so far.

    `agreed`: called in between; it may raise, and nothing is loaded then.
    """
    refuse_other_kinds(saved)
    targets = {
        "model": model_tensors(model),
        "optimizer": named_state(layout, state),
        "counts": keys.section(state, keys.COUNTS),
    }
    if absent := [key for key in (*targets, "hyperparameters", "steps_called") if key not in saved]:
        raise ValueError(
            f"this is no state of a training step: it lacks {', '.join(absent)}. Give what state_dict() gave."
        )
    # The loss's first run shows which buffers outside the model's state_dict() it changes. Before that run, trust the
    # checkpoint.
    buffers = dict(model.named_buffers())
    targets["buffers"] = {n: buffers[n] for n in saved.get("buffers", {}) if n in buffers}
    _refuse_mismatches(saved, targets, "Build the step with the model, recipe and groups that saved it.")
    _refuse_negative(saved)
    _refuse_copies(model, targets["model"])
    numbers = hyperparameters.read(saved["hyperparameters"])
    lacking = [name for name in hyperparameters if name not in saved["hyperparameters"]]
    if len(lacking) == len(hyperparameters):
        raise ValueError(
            f"the checkpoint has none of the hyperparameters {', '.join(hyperparameters)}; nothing was loaded. Give "
            f"what state_dict() gave."
        )
    rng = RandomState(saved.get("rng", {}), layout.device)
    if agreed is not None:
        agreed()
    with torch.no_grad():
        for section, wanted in targets.items():
            _put(model if section == "model" else None, wanted, saved[section])
    hyperparameters.update(numbers)
    rng.put()
    _say_other_numbers(lacking, [name for name in saved["hyperparameters"] if name not in hyperparameters])
    return int(saved["steps_called"])


def of(source: str | PathLike[str] | Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """The state that `source` is, or that lies in the folder `source`. Anything else is refused."""
    if not isinstance(source, Mapping):
        if not isinstance(source, str | PathLike):
            raise TypeError(
                f"the source is a {type(source).__name__}; give the folder that save() wrote or what state_dict() gave."
            )
        source = checkpoint_folder.load(source, device)
    refuse_other_kinds(source)
    if absent := [key for key in ("model", "optimizer") if key not in source]:
        raise ValueError(
            f"this is no state of a training step: it lacks {', '.join(absent)}. Give what state_dict() gave."
        )
    return source


def load_model(saved: Mapping[str, Any], model: nn.Module) -> None:
    """Copy only the ``model`` section into place. A mismatch is a ValueError, and nothing is loaded."""
    wanted = refuse_another_model(saved, model)
    with torch.no_grad():
        _put(model, wanted, saved["model"])


def refuse_another_model(saved: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Raise ValueError unless the ``model`` section fits; the model's tensors by name."""
    wanted = model_tensors(model)
    _refuse_mismatches(saved, {"model": wanted}, "Build the step with the model that the checkpoint is of.")
    _refuse_copies(model, wanted)
    return wanted


def refuse_other_kinds(saved: Any) -> None:
    """Raise TypeError for what is no dictionary of sections, or holds something else where `state_dict` has tensors."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"the state is a {type(saved).__name__}; give what state_dict() gave.")
    for section in ("model", *checkpoint_folder.STATE_SECTIONS):
        found = saved.get(section, {})
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{section!r} of the state is a {type(found).__name__}, not a dictionary of tensors; nothing was "
                f"loaded. Give what state_dict() gave."
            )
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{section} {name} is a {type(value).__name__}, not a tensor; nothing was loaded. Give what "
                    f"state_dict() gave."
                )
    for section in ("hyperparameters", "numbers"):
        if not isinstance(found := saved.get(section, {}), Mapping):
            raise TypeError(
                f"{section!r} of the state is a {type(found).__name__}, not a dictionary of numbers; nothing was "
                f"loaded. Give what state_dict() gave."
            )


def _refuse_negative(saved: Mapping[str, Any]) -> None:
    called = saved["steps_called"]
    if not isinstance(called, int) or isinstance(called, bool) or called < 0:
        raise ValueError(f"steps_called is {called!r}, no number of calls; nothing was loaded. Give a whole number.")
    for name, count in saved["counts"].items():
        if int(count) < 0:
            raise ValueError(f"the count {name!r} is {int(count)}; nothing was loaded. A count is never negative.")


def _say_other_numbers(lacking: list[str], unknown: list[str]) -> None:
    if lacking:
        warnings.warn(
            f"the checkpoint lacks the hyperparameters {', '.join(lacking)}: they stay what they are.", stacklevel=4
        )
    if unknown:
        warnings.warn(
            f"the checkpoint has the hyperparameters {', '.join(unknown)}, which this step does not have: they count "
            f"for nothing.",
            stacklevel=4,
        )


def _refuse_copies(model: nn.Module, tensors: Tensors) -> None:
    """Raise ValueError if a hook lets the model's ``state_dict()`` give copies: a copy cannot be loaded into."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() not in own and not _is_extra(name):
            raise ValueError(
                f"{name} {list(tensor.shape)} of the model's state_dict() is a copy and not the model's own tensor, "
                f"so nothing could be loaded into it; nothing was loaded. Remove the state_dict hook that makes the "
                f"copy, or load the weights with model.load_state_dict()."
            )


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA


def _put(model: nn.Module | None, wanted: Tensors, given: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        if model is not None and _is_extra(name):
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(given[name].detach().clone())
        elif name in given:
            tensor.copy_(given[name])
        else:
            tensor.zero_()


def _refuse_mismatches(saved: Mapping[str, Any], targets: Mapping[str, Tensors], remedy: str) -> None:
    lines: list[str] = []
    for section, wanted in targets.items():
        lines += mismatches(wanted, saved.get(section, {}), lambda name, section=section: f"{section} {name}")  # type: ignore[misc]
    refuse_mismatches(lines, remedy)
