"""Optimizers by name, with options from a plain dictionary: what a configuration file can say."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fusion_compile.optim import _schedules
from fusion_compile.optim._transform import Named, Transform
from fusion_compile.optim.adafactor import adafactor
from fusion_compile.optim.adam_recipes import adabelief, adamp, adopt
from fusion_compile.optim.adamuon_sign import adamuon_sign
from fusion_compile.optim.fusion import fusion
from fusion_compile.optim.fusionopt_compat import fusionopt_compat
from fusion_compile.optim.kaon_recipes import adakaon, adamuon, adapnm, autokaon, nekaon
from fusion_compile.optim.kempner_recipes import kempner_muon, kempner_sf_adamw
from fusion_compile.optim.prodigy import prodigy
from fusion_compile.optim.recipes import RECIPES

_KNOWN: dict[str, Callable[..., Transform]] = {
    **RECIPES,
    **{
        factory.__name__: factory
        for factory in (
            adabelief,
            adafactor,
            adakaon,
            adamp,
            adamuon,
            adamuon_sign,
            adapnm,
            adopt,
            autokaon,
            fusion,
            fusionopt_compat,
            kempner_muon,
            kempner_sf_adamw,
            nekaon,
            prodigy,
        )
    },
}
_SCHEDULES = ("constant", "cosine", "linear", "rex", "wsd")


def names() -> tuple[str, ...]:
    """All names that `create` knows, registered ones last."""
    return tuple(_KNOWN)


def factory_of(name: str) -> Callable[..., Transform] | None:
    """The factory called `name`; None where there is none."""
    return _KNOWN.get(name)


def register(name: str, factory: Callable[..., Transform]) -> None:
    """Let `create`, and every ``optimizer=``, know `factory` as `name`.

    Args:
        name: Not taken yet.
        factory: Makes a transform of its keyword arguments.

    Raises:
        ValueError: The name is taken, or empty.
        TypeError: `name` is no string, or `factory` cannot be called.

    Example:
        >>> from fusion_compile import optim
        >>> def my_sgd(lr=0.1):
        ...     return optim.chain(optim.scale_by_learning_rate(lr), name="my_sgd")
        >>> optim.register("my_sgd", my_sgd)
        >>> optim.create("my_sgd", lr=0.5).hyperparameters["lr"]
        0.5
    """
    if not isinstance(name, str) or not callable(factory) or isinstance(factory, Transform):
        raise TypeError(f"register({name!r}, …) needs a name and a function that makes a Transform.")
    if not name or (name in _KNOWN and _KNOWN[name] is not factory):
        raise ValueError(f"register(): the name {name!r} is taken; give your optimizer another one.")
    _KNOWN[name] = factory


def create(name: str | Mapping[str, Any] | Any, /, **options: Any) -> Transform:
    """Make the optimizer called `name`: ``create("muon", lr=0.02)``, ``create({"name": "muon", "lr": 0.02})``.

    Options are plain: what a YAML file or a dataclass holds. A list stands for a pair. A dictionary with ``schedule``
    is a schedule: ``{"schedule": "wsd", "peak": 1e-3, "total_steps": 1000}``. One with ``name`` and ``value`` gives a
    number a name of its own.

    Args:
        name: A recipe's name, a registered one, or all in one: a dictionary, or an instance of a dataclass, with
            ``name`` and the options.
        **options: The factory's own; they count more than those in a dictionary.

    Returns:
        The transform.

    Raises:
        ValueError: The name or an option is not known; the sentence lists those that are.
        TypeError: `name` is none of the above.

    Example:
        >>> from fusion_compile import optim
        >>> config = {"name": "adakaon", "lr": {"schedule": "cosine", "peak": 1e-4, "total_steps": 100}}
        >>> optim.create(config, betas=[0.0, 0.999]).name
        'adakaon'
    """
    if dataclasses.is_dataclass(name) and not isinstance(name, type):
        name = dataclasses.asdict(name)
    if isinstance(name, Mapping):
        options = {**name, **options}
        name = options.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(f"create() was given a {type(name).__name__}; give a name, or a dictionary with 'name'.")
    if name not in _KNOWN:
        close = difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"create(): {name!r} is not an optimizer; use one of {', '.join(_KNOWN)}.{hint}")
    factory = _KNOWN[name]
    taken = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()) and (unknown := [o for o in options if o not in taken]):
        raise ValueError(f"create(): {name} has no option {unknown[0]!r}; it has {', '.join(taken)}.")
    return factory(**{option: _value(option, given) for option, given in options.items()})


def _value(option: str, given: Any) -> Any:
    if isinstance(given, list):
        return tuple(_value(option, one) for one in given)
    if not isinstance(given, Mapping):
        return given
    if "schedule" in given:
        kind = given["schedule"]
        if kind not in _SCHEDULES:
            raise ValueError(f"create(): {option} has the schedule {kind!r}; use one of {', '.join(_SCHEDULES)}.")
        rest = {key: value for key, value in given.items() if key != "schedule"}
        try:
            return getattr(_schedules, kind)(**rest)
        except TypeError as error:
            raise ValueError(f"create(): {option}, schedule {kind!r}: {error}.") from None
    if set(given) == {"name", "value"}:
        return Named(given["name"], _value(option, given["value"]))
    raise ValueError(
        f"create(): {option}={dict(given)} is no number; give a number, a list, {{'schedule': …}} or "
        f"{{'name': …, 'value': …}}."
    )
