"""Live numbers: a mapping whose values lie in one device tensor that the compiled program reads."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile.optim import _schedules
from fusion_compile.optim._ranges import is_number, refuse_given, refuse_out_of_range
from fusion_compile.optim._schedules import Schedule


class Hyperparameters(MutableMapping[str, float | Schedule]):
    """``step.hyperparameters``: numbers and schedules by name. A value that is set counts from the next step.

    Values are written to the device without waiting for it. Reading returns the number or schedule that was set.
    `tensor`: ``[n]``, one entry per hyperparameter, fp32 (fp64 for fp64 models).
    """

    def __init__(self, defaults: Mapping[str, float | Schedule], device: torch.device, dtype: torch.dtype) -> None:
        self.tensor = torch.zeros(len(defaults), dtype=dtype, device=device)
        self._values: dict[str, float | Schedule] = {}
        self._written: dict[str, float] = {}
        self._index = {name: i for i, name in enumerate(defaults)}
        for name, value in defaults.items():
            self[name] = value

    def __getitem__(self, name: str) -> float | Schedule:
        self._check_known(name)
        return self._values[name]

    def __setitem__(self, name: str, value: float | Schedule) -> None:
        if type(value) is float and self._values.get(name) == value:
            return  # the torch optimizer sets all its numbers at each step
        number = self.check(name, value)
        self._values[name] = value if callable(value) else float(value)
        if not callable(value):
            self._write(name, number)

    def update(self, given: Any = (), /, **more: float | Schedule) -> None:
        """Set several. All are checked before the first is set."""
        values = dict(given, **more)
        for name, value in values.items():
            self.check(name, value)
        for name, value in values.items():
            self[name] = value

    def check(self, name: str, value: float | Schedule) -> float:
        """Refuse what `name` cannot be set to, and return the number that `value` is or begins with.

        Raise KeyError for an unknown name, TypeError for what is neither a number nor a schedule, ValueError for a
        number outside of its range (`optim._ranges`).
        """
        self._check_known(name)
        if isinstance(value, Tensor):
            raise TypeError(
                f"hyperparameter {name!r} was given a tensor; give a number or a schedule, a callable of the step."
            )
        if not (is_number(value) or callable(value)):
            raise TypeError(f"hyperparameter {name!r} was given {value!r}; give a number or a schedule.")
        if callable(value):
            _check_signature(name, value)
        refuse_given(name, value)
        return self._value_of(name, value, 0)

    def __delitem__(self, name: str) -> None:
        raise TypeError(
            f"hyperparameter {name!r} is part of the compiled program and cannot be removed; set it instead."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Hyperparameters({', '.join(f'{k}={v}' for k, v in self._values.items())})"

    def apply_schedules(self, step: int) -> None:
        """Write every schedule's value after `step` steps. If one is out of its range, raise ValueError and write
        none."""
        due = {name: self._value_of(name, value, step) for name, value in self._values.items() if callable(value)}
        for name, number in due.items():
            self._write(name, number)

    def now(self) -> dict[str, float]:
        """The numbers that the next step reads, by name."""
        return dict(self._written)

    def by_name(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split a tensor like `tensor` (inside the program, its input) into 0-dim tensors by name."""
        return dict(zip(self._index, tensor.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Numbers as they are, the package's schedules by their fields, other callables by name only."""
        return {name: _to_json(value) for name, value in self._values.items()}

    def read(self, saved: Mapping[str, Any]) -> dict[str, float | Schedule]:
        """Read what `state_dict` gave into values for `update`, without changing anything.

        Names that the step lacks are left out, and callables that are not the package's own, so that their present
        values stay.
        """
        restored = {name: _from_json(name, value) for name, value in saved.items() if name in self._index}
        numbers = {name: value for name, value in restored.items() if value is not None}
        for name, value in numbers.items():
            self.check(name, value)
        return numbers

    def _value_of(self, name: str, value: float | Schedule, step: int) -> float:
        """The number that `value` is or has after `step` steps, refused where it makes no sense."""
        given: Any = value(step) if callable(value) else value
        if isinstance(given, bool | str) or not hasattr(given, "__float__"):
            raise TypeError(
                f"the schedule of hyperparameter {name!r} gave {given!r} at step {step}; a schedule returns a number."
            )
        number = float(given)
        if callable(value) and math.isnan(number):
            raise ValueError(f"the schedule of hyperparameter {name!r} gave nan at step {step}: {value}.")
        try:
            refuse_out_of_range(name, number)
            self._refuse_unfit(name, number)
        except ValueError as error:
            if callable(value):
                raise ValueError(f"{error} Its schedule gave that at step {step}: {value}.") from None
            raise
        return number

    def _refuse_unfit(self, name: str, number: float) -> None:
        """Raise ValueError for a number that lies in its range and whose rounding to the device's dtype does not."""
        dtype = self.tensor.dtype
        if math.isfinite(number) and abs(number) > torch.finfo(dtype).max:
            raise ValueError(
                f"hyperparameter {name!r} is {number}, which is infinite in {dtype}; give a smaller number."
            )
        if self._written.get(name) == number:
            return
        rounded = torch.tensor(number, dtype=dtype).item()
        refuse_out_of_range(name, rounded, f"hyperparameter {name!r}, given as {number!r} and rounded to {dtype},")

    def _write(self, name: str, number: float) -> None:
        if self._written.get(name) != number:
            self.tensor[self._index[name]].fill_(number)
            self._written[name] = number

    def _check_known(self, name: str) -> None:
        if name not in self._index:
            close = difflib.get_close_matches(str(name), self._index, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            group = str(name).partition(".")[0]
            if any(known.startswith(f"{group}.") for known in self._index):
                hint += f" Group {group!r} has the numbers that it was given; list this one when you compile the step."
            raise KeyError(f"unknown hyperparameter {name!r}; this step has {', '.join(self._index)}.{hint}")


def _check_signature(name: str, schedule: Schedule) -> None:
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # written in C
        return
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"the schedule of hyperparameter {name!r} cannot be called with the number of steps taken ({error}); give "
            f"a callable of one argument, optim.constant(1e-3) for example."
        ) from None


def _to_json(value: float | Schedule) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and type(value).__module__ == _schedules.__name__:
        return {"schedule": type(value).__name__, **dataclasses.asdict(value)}
    return {"schedule": None, "callable": repr(value)}


def _from_json(name: str, value: Any) -> float | Schedule | None:
    if not isinstance(value, Mapping):
        number = value in ("inf", "-inf", "nan") if isinstance(value, str) else is_number(value)
        if not number:
            raise ValueError(f"hyperparameter {name!r} of the checkpoint is {value!r}, no number; nothing was loaded.")
        return float(value)
    called = value.get("schedule", "")
    if called is None:
        return None
    kind = getattr(_schedules, called, None) if isinstance(called, str) and not called.startswith("_") else None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"hyperparameter {name!r} follows the schedule {called!r}, which this version does not have.")
    try:
        schedule: Any = kind(**{k: v for k, v in value.items() if k != "schedule"})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"hyperparameter {name!r} follows a schedule {called!r} that cannot be made ({error}); nothing was loaded."
        ) from error
    made: Schedule = schedule
    return made
