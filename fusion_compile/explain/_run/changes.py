"""All sizes and numbers that changed before a recompile. torch names only the first one that it met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fusion_compile.explain._run.compilations import Compilation
from fusion_compile.explain._run.recompile_reasons import Words, number_words, size_words


class Change(NamedTuple):
    """A value that is not what a program was compiled for. `at`: the dimension, or None for a Python number."""

    name: str
    at: int | None
    before: str
    now: str


def changes(failed: Compilation, compiled: Compilation) -> tuple[Change, ...]:
    """Compare the sizes and numbers for which `failed` was compiled with those of the call that compiled it again."""
    found = []
    for name, sizes in failed.fixed_sizes.items():
        now = compiled.sizes.get(name, ())
        if len(now) == len(sizes):
            pairs = enumerate(zip(sizes, now, strict=True))
            found += [Change(name, i, str(old), str(new)) for i, (old, new) in pairs if old is not None and old != new]
    for name, value in failed.fixed_numbers.items():
        number = compiled.numbers.get(name)
        if number is not None and not name.startswith("___stack") and float(number) != float(value):
            found.append(Change(name, None, _short(value), _short(number)))
    return tuple(found)


def _short(number: str) -> str:
    """``"0.09000000000000001"`` -> ``"0.09"``; a number without a fraction stays."""
    return f"{float(number):.6g}" if "." in number else number


def told_together(found: Sequence[Change]) -> list[tuple[str, Words]]:
    """Put `found` in words, each with the name of its first value. Sizes that changed alike are told together: the
    batch size of all inputs is one change."""
    alike: dict[tuple[str, str], list[Change]] = {}
    for change in found:
        if change.at is not None:
            alike.setdefault((change.before, change.now), []).append(change)
    told = [
        (group[0].name, size_words([(c.name, c.at) for c in group if c.at is not None], before, now))
        for (before, now), group in alike.items()
    ]
    return told + [(c.name, number_words(c.name, c.before, c.now)) for c in found if c.at is None]
