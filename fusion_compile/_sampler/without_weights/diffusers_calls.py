"""Example arguments for diffusers' transformers: one call of `forward` as the class's pipeline makes it.

A checkpoint's ``config.json`` is enough: every size follows from it. Weights and examples may be meta tensors, which
have shapes and no data. diffusers is imported only when one of its classes is needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._sampler.without_weights.diffusers_arguments import FAMILIES, TIMESTEP, CallSizes, Clock, Maker


@dataclass(frozen=True)
class ExampleCall:
    """`arguments`: of one call, by name. `schedule` ``[n_steps]``: timesteps as the class's pipeline gives them."""

    arguments: dict[str, Any]
    schedule: Tensor


def model_of_config(path: str | Path) -> nn.Module:
    """Build the model of a diffusers ``config.json``, or of the folder it is in, with new weights.

    Built under ``torch.device("meta")`` it takes no memory. Raises ValueError for a file that is no such config, for a
    class that diffusers does not have, and without diffusers.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {file}; give a diffusers config.json or a folder with one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); give the config.json of a diffusers model.") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{file} has no _class_name; give the config.json of a diffusers transformer.")
    return model_of_class(name, config)


def model_of_class(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build diffusers' class `name` from `config`; raises ValueError as `model_of_config` does."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            f"{name} is a class of diffusers, which cannot be imported ({error}); pip install diffusers."
        ) from error
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        version = getattr(diffusers, "__version__", "?")
        raise ValueError(f"diffusers {version} has no model class {name!r}; a newer version may have it.")
    model: nn.Module = found.from_config(dict(config))  # type: ignore[attr-defined]
    return model.eval()


def known_classes() -> tuple[str, ...]:
    """Names of the classes that `example_call` knows."""
    return tuple(sorted(FAMILIES))


def example_call(model: nn.Module, n_steps: int, sizes: CallSizes | None = None) -> ExampleCall:
    """Make up a call of `model`, a transformer of diffusers, on its device and in its dtype, with random contents.

    Raises ValueError for a class that is not one of `known_classes`.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"no example call is known for {name}; known are {', '.join(known_classes())}. Write module:factory whose "
            f"factory() returns (model, args) or (model, args, kwargs)."
        )
    family = FAMILIES[name]
    maker = Maker(model, sizes or CallSizes())
    schedule = example_schedule(family.clock, n_steps)
    if family.like_weights:
        schedule = schedule.to(maker.dtype)
    t = torch.zeros(maker.batch if family.per_sample else 1, dtype=schedule.dtype, device=maker.device)
    if t.device.type != "meta":
        t += schedule[n_steps // 2]
    arguments = family.arguments(maker)
    return ExampleCall({name: t if value is TIMESTEP else value for name, value in arguments.items()}, schedule)


def example_schedule(clock: Clock, n_steps: int) -> Tensor:
    """``[n_steps]`` falling timesteps in the units of `clock`, on the CPU."""
    ratio = torch.linspace(1, 0, n_steps + 1, dtype=torch.float64, device="cpu")[:-1]
    if clock == "index":
        return (ratio * 999).round().long()
    return (ratio * (1000 if clock == "thousand" else 1)).float()
