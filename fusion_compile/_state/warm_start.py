"""Which saved state another recipe can reuse, matched by field and parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._state.banks import Layout
from fusion_compile._state.named_state import named_state
from fusion_compile._state.other_codecs import encode_into, in_plain_numbers, stand_ins
from fusion_compile._types import Tensors


@dataclass(frozen=True)
class WarmStart:
    """What `TrainingStep.warm_start` did. Names are ``<field>.<parameter>``.

    Attributes:
        carried: Entries of the optimizer's state that came from the checkpoint.
        fresh: Entries that start as in a new run.
        unused: Entries of the checkpoint that this recipe does not keep.

    Example:
        >>> import fusion_compile as fc
        >>> print(fc.WarmStart(carried=("mu.0.weight",), fresh=("nu.0.weight",), unused=()))
        carried mu; fresh: nu; not used: nothing
    """

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        def fields(names: tuple[str, ...]) -> str:
            return ", ".join(dict.fromkeys(n.partition(".")[0] for n in names)) or "nothing"

        return f"carried {fields(self.carried)}; fresh: {fields(self.fresh)}; not used: {fields(self.unused)}"


class _Entry(NamedTuple):
    """One name of the optimizer's state, split: ``<part>.<field>.<parameter>``. A number that all parameters of the
    part share is ``<part>.<field>``."""

    part: str
    field: str
    parameter: str | None

    @property
    def key(self) -> str:
        return self.field if self.parameter is None else f"{self.field}.{self.parameter}"


def _split(name: str, parameters: tuple[str, ...]) -> _Entry:
    fitting = [p for p in parameters if name.endswith(f".{p}")]
    parameter = max(fitting, key=len) if fitting else None
    path = name if parameter is None else name.removesuffix(f".{parameter}")
    part, _, field = path.rpartition(".")
    above, _, owner = part.rpartition(".")
    if owner and field.startswith(
        f"{owner}_"
    ):  # what a codec keeps of a field, mu.mu_int8, belongs to the field's part
        part = above
    # The fp32 masters belong to the step and to no part of the transform.
    return _Entry(field if field == "master" else part, field, parameter)


def begin_from(saved: Mapping[str, Any], layout: Layout, state: Tensors) -> WarmStart:
    """Carry the saved optimizer entries that fit into `state`, whose banks have `layout`. A field that the checkpoint
    keeps in another codec is converted."""
    parameters = tuple(place.name for bank in layout.banks for place in bank.places)
    own = named_state(layout, state)
    made = stand_ins(own, saved, layout)
    taken = {name for _, names in made.values() for name in names}
    plain = {plain_name: numbers for plain_name, (numbers, _) in made.items()}
    with torch.no_grad():
        converted = in_plain_numbers(saved, own, layout)
        done = carry_over(converted, {**{n: t for n, t in own.items() if n not in taken}, **plain}, parameters)
        carried = {n: t for n, t in plain.items() if _split(n, parameters).key in done.carried}
        encode_into(own, carried, layout)
    return done


def carry_over(saved: Mapping[str, Any], own: Tensors, parameters: tuple[str, ...]) -> WarmStart:
    """Copy what fits from the saved optimizer entries into `own` (views of the state by name).

    An entry fits when the field (``z``, ``mu``, ``nu``, ``weight_sum``, …), the parameter and the shape are the same,
    and the checkpoint has one value for it. A field is carried for all of a part's parameters or for none. A part that
    keeps numbers for all of them together (Adam's powers of β, an average's weight) is carried whole or not at all: a
    fresh moment beside an old count would be corrected for a past that it never had. Such a number comes from the saved
    parts that keep one of the same parameters, so groups with rates of their own keep numbers of their own.
    """
    saved_entries = {name: _split(name, parameters) for name in saved}
    entries = {name: _split(name, parameters) for name in own}
    saved_members, members = _members(saved_entries.values()), _members(entries.values())
    given: dict[str, list[tuple[str, Tensor]]] = {}
    for name, value in saved.items():
        given.setdefault(saved_entries[name].key, []).append((saved_entries[name].part, value))

    def value_for(name: str, entry: _Entry) -> Tensor | None:
        candidates, mine = given.get(entry.key, []), members.get(entry.part)
        if entry.parameter is None and mine:
            candidates = [(part, v) for part, v in candidates if mine & saved_members.get(part, set())]
        elif entry.parameter is None and name in saved:
            candidates = [(entry.part, saved[name])]
        values = [value for _, value in candidates]
        one = values and all(v.shape == values[0].shape and torch.equal(v, values[0]) for v in values)
        return values[0] if one and values[0].shape == own[name].shape else None

    found = {name: value_for(name, entry) for name, entry in entries.items()}
    lacking_fields = {(e.part, e.field) for n, e in entries.items() if found[n] is None}
    # Codes without their scales are other numbers.
    lacking_fields |= {(part, field.removesuffix("_scale")) for part, field in lacking_fields}
    lacking_fields |= {(part, f"{field}_scale") for part, field in lacking_fields}
    with_shared = {e.part for e in entries.values() if e.parameter is None}
    lacking_parts = {part for part, _ in lacking_fields} & with_shared
    carried: dict[str, None] = {}
    fresh: dict[str, None] = {}
    with torch.no_grad():
        for name, entry in entries.items():
            value = found[name]
            if (
                value is not None
                and (entry.part, entry.field) not in lacking_fields
                and entry.part not in lacking_parts
            ):
                own[name].copy_(value)
                carried[entry.key] = None
            else:
                fresh[entry.key] = None
    return WarmStart(tuple(carried), tuple(fresh), tuple(k for k in given if k not in carried))


def _members(entries: Iterable[_Entry]) -> dict[str, set[str]]:
    """By part, the parameters of which it keeps something."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        if entry.parameter is not None:
            found.setdefault(entry.part, set()).add(entry.parameter)
    return found
