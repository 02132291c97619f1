"""Conversion of frozen dataclasses to JSON data, and back by their annotations."""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries and tuples into lists. Other values must be JSON's own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def rebuild(kind: Callable[..., T], data: Any) -> T:
    """Make the dataclass `kind` from the result of `plain`. Ignore unknown keys; raise TypeError for a missing one."""
    hints = _hints(kind)
    return kind(**{name: _value(hints[name], item) for name, item in data.items() if name in hints})


def _value(hint: Any, data: Any) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin is tuple:
        each = options[:1] * len(data) if options[1:] == (...,) else options
        return tuple(_value(option, item) for option, item in zip(each, data, strict=True))
    if origin in (Union, types.UnionType):
        inner = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
        return rebuild(inner[0], data) if inner and data is not None else data
    return rebuild(hint, data) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else data


@cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def write_json(data: Any, path: str | os.PathLike[str]) -> None:
    """Write beside `path`, then rename. A reader sees the old file or the new one, never half of one."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the JSON file `path`. Raise ValueError naming it if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file that Explanation.to_json wrote.") from None
