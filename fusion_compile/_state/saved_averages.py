"""The state of a moving average that another library kept: its weights by parameter name, and its count of updates."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fusion_compile._state.mismatches import mismatches, refuse_mismatches
from fusion_compile._types import Tensors
from fusion_compile.optim.averaged import Average

_LISTS, _WEIGHTS_OF_TIMM = "shadow_params", "state_dict_ema"
_COUNTS = ("optimization_step", "num_updates", "n_averaged", "step")
"""Of diffusers, torch-ema, swa_utils and ema_pytorch."""
_PREFIXES = ("ema_model.", "module.", "_orig_mod.")
"""Of ema_pytorch, of timm, swa_utils and DistributedDataParallel, and of torch.compile."""
_BESIDE = ("online_model.",)


class SavedAverage(NamedTuple):
    """`weights`: by parameter name. `updates`: so many were taken; None where it does not say."""

    weights: Tensors
    updates: int | None


def read_average(saved: Any, own: Tensors, averaged: Collection[str], average: Average) -> SavedAverage:
    """What `saved` has for the parameters `averaged`.

    `saved`: an object with a ``state_dict()``, or that. `own`: all parameters of the model by name, in order.
    `average`: with whose decay the saved one is compared. Raises TypeError and ValueError, see
    `KeptAverage.load_state_dict`.
    """
    if not isinstance(saved, Mapping) and callable(getattr(saved, "state_dict", None)):
        saved = saved.state_dict()
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"EMA.load_state_dict() was given a {type(saved).__name__}; give the state_dict() of an average, or "
            f"tensors by parameter name."
        )
    if isinstance(saved.get(_WEIGHTS_OF_TIMM), Mapping):
        saved = saved[_WEIGHTS_OF_TIMM]
    _say_of_decay(saved, average)
    weights = _from_list(saved[_LISTS], own, averaged) if _LISTS in saved else _by_name(saved)
    wanted = {name: own[name] for name in own if name in averaged}
    # Frozen parameters and buffers are the model's own.
    given = {name: weights[name] for name in wanted if name in weights}
    lines = [f"missing {name} {list(p.shape)}" for name, p in wanted.items() if name not in given]
    lines += mismatches(wanted, given, lambda name: name, complete=False)
    refuse_mismatches(lines, "Give the average of this model's parameters.")
    return SavedAverage(given, _updates(saved))


def _from_list(given: Any, own: Tensors, averaged: Collection[str]) -> Tensors:
    """Tensors in the order of ``model.parameters()``, or of those that are trained."""
    tensors = list(given)
    for names in (list(own), [name for name in own if name in averaged]):
        if len(names) == len(tensors):
            return dict(zip(names, tensors, strict=True))
    raise ValueError(
        f"the average has {len(tensors)} parameters, the model {len(own)}, of which {len(averaged)} are averaged; "
        f"nothing was loaded. Give the average of this model's parameters."
    )


def _by_name(saved: Mapping[str, Any]) -> Tensors:
    found = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor) or name.startswith(_BESIDE):
            continue
        clean = name
        while prefix := next((p for p in _PREFIXES if clean.startswith(p)), ""):
            clean = clean.removeprefix(prefix)
        found[name if name in found else clean] = tensor
        found.setdefault(name, tensor)  # a model may have a part called "module"
    return found


def _updates(saved: Mapping[str, Any]) -> int | None:
    found = next((saved[name] for name in _COUNTS if name in saved), None)
    if isinstance(found, Tensor):
        return int(found) if found.numel() == 1 and not found.dtype.is_floating_point else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _say_of_decay(saved: Mapping[str, Any], average: Average) -> None:
    decay = saved.get("decay")
    if isinstance(decay, float) and average.number and abs((1 - decay) - average.rate) > 1e-9:
        warnings.warn(
            f"the average was kept with decay={decay:g} and goes on with {1 - average.rate:g}, this EMA's own; give "
            f"EMA(decay={decay:g}) to go on as before.",
            stacklevel=4,
        )
