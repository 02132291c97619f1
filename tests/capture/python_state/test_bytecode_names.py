"""The names of globals are read out of bytecode, nested functions included."""

from __future__ import annotations

from typing import Any

from fusion_compile._capture.python_state.bytecode import names_of

FIRST = SECOND = THIRD = FOURTH = 0


def reads_and_writes(x: Any) -> Any:
    global SECOND
    SECOND = FIRST + x.attribute
    return [lambda: THIRD, *(y + FOURTH for y in x)]


def test_globals_are_told_from_attributes() -> None:
    names = names_of(reads_and_writes.__code__)
    assert names.of_globals == {"FIRST", "SECOND", "THIRD", "FOURTH"}
    assert names.others - names.of_globals == {"attribute"}


def test_more_than_256_names_are_read() -> None:
    """Arguments of more than one byte have prefixes."""
    source = "def many():\n    return [" + ", ".join(f"name_{i}" for i in range(300)) + "]"
    scope: dict[str, Any] = {}
    exec(source, scope)
    assert names_of(scope["many"].__code__).of_globals == {f"name_{i}" for i in range(300)}
