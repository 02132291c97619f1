"""The meaning of a failed guard, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Words(NamedTuple):
    """What a finding about a recompile says."""

    kind: str
    op: str
    why: str
    remedy: str


_NUMBER = r"-?(?:\d[\d.]*(?:e[+-]?\d+)?|inf|nan)"
_AGAIN = "so the program was compiled again."


def plain_words(text: str, types: Mapping[str, str]) -> Words:
    """Describe the failed guard `text`, whose names are as the user wrote them. `types`: of the guarded values."""
    for pattern, say in _ROWS:
        found = re.search(pattern, text)
        if found and (words := say(found, types)):
            return words
    return Words("recompile", "", f"An assumption of the compiled program failed ({text}), {_AGAIN}", _SAME)


_SAME = "Keep it the same at every call, or pass what changes as a tensor."
_Say = Callable[[re.Match[str], Mapping[str, str]], Words | None]


def _tensor(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name, what, detail = found["name"], found["what"], found["detail"].strip()
    if what == "size":
        index = found["detail"].split("index ")[1].split(".")[0]
        return Words(
            "dynamic_shape",
            name,
            f"The size of dimension {index} of {name} changed ({_then_now(detail)}), {_AGAIN}",
            f"Pad or bucket to one size (DataLoader(drop_last=True)), or declare before the first call that it varies: "
            f"torch._dynamo.mark_dynamic({name}, {index}).",
        )
    return Words(
        "recompile",
        name,
        f"The {_WHAT.get(what, what)} of {name} changed ({_then_now(detail)}), {_AGAIN}",
        f"Give {name} the same {_WHAT.get(what, what)} at every call.",
    )


_WHAT = {
    "rank": "number of dimensions",
    "stride": "memory layout",
    "requires_grad": "requires_grad",
    "dispatch key set": "kind of tensor (device, subclass, inference mode)",
}


def _then_now(detail: str) -> str:
    found = re.search(r"expected (.+?), actual (.+)", detail)
    return f"from {found[1]} to {found[2]}" if found else detail


def _shape(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "dynamic_shape",
        name,
        f"A size of {name} left the range for which the program was compiled ({found.string}), {_AGAIN}",
        "Pad or bucket to a few sizes (DataLoader(drop_last=True)).",
    )


def _rest(found: re.Match[str], types: Mapping[str, str]) -> Words:
    return Words(
        "recompile",
        "",
        f"A value computed before the graph break is another object now, {_AGAIN}",
        "Remove the graph break before it.",
    )


def _number(found: re.Match[str], types: Mapping[str, str]) -> Words | None:
    name = found["name"]
    if name.startswith("___stack"):
        return Words(
            "recompile",
            "",
            f"A Python number computed before the graph break changed ({found.string}), {_AGAIN}",
            "Remove the graph break before it, or make the number a 0-dim tensor.",
        )
    return Words(
        "python_scalar",
        name,
        f"{name} is a Python number. It was {found['value']} when the program was compiled and then changed, {_AGAIN}",
        "Pass it as a 0-dim tensor on the program's device, and write new values with fill_.",
    )


def _length(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    if types.get(name, "").endswith(("dict", "Dict", "dict_keys")):
        return _keys(found, types)
    return Words(
        "growing_state",
        name,
        f"The length of {name} changed (before: {found.string.strip()}), {_AGAIN}",
        "Keep a tensor of fixed size instead, or keep the list outside the compiled function.",
    )


def _keys(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "recompile",
        name,
        f"The keys of {name} or their order changed (before: {found.string.strip()}), {_AGAIN}",
        f"Give {name} the same keys in the same order at every call.",
    )


def _text(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "recompile",
        name,
        f"{name} was {found['value']} when the program was compiled and then changed, {_AGAIN}",
        f"Keep {name} the same at every call; put values that change often into a tensor.",
    )


def _identity(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    kind = "rebound_parameter" if types.get(name, "").endswith("Parameter") else "recompile"
    return Words(
        kind,
        name,
        f"{name} is not the object that it was at compilation, {_AGAIN}",
        f"Keep the object and write new values into it: {name}.copy_(new)."
        if kind == "rebound_parameter"
        else "Keep the object and change its content.",
    )


def _type(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "recompile",
        name,
        f"The type of {name} is not the one at compilation, {_AGAIN}",
        f"Give {name} the same type at every call.",
    )


def _state(found: re.Match[str], types: Mapping[str, str]) -> Words:
    what = " and ".join(found["what"].split()) or "a global setting"
    return Words(
        "recompile",
        what,
        f"Torch's global state changed ({what}), {_AGAIN}",
        "Call it under the same settings every time: grad mode, autocast, number of threads, determinism.",
    )


def _none(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "recompile",
        name,
        f"{name} was None at one call and not at another, {_AGAIN}",
        f"Give {name} the same kind of value at every call.",
    )


_NAME = r"(?P<name>[A-Za-z_][\w.\[\]'\"]*)"
_LAZY = r"(?P<name>[A-Za-z_][\w.\[\]'\"]*?)"
_ROWS: tuple[tuple[str, _Say], ...] = (
    (
        rf"^tensor '?{_LAZY}'? (?P<what>size|rank|stride|dtype|requires_grad|dispatch key set|device(?: index)?) "
        r"mismatch(?P<detail>.*)",
        _tensor,
    ),
    (r"GLOBAL_STATE changed:(?P<what>.*)", _state),
    (r"Cache line invalidated because ___stack\d+ got deallocated", _rest),
    (rf"{_LAZY}\.(?:size\(\)|stride\(\)|shape)\[", _shape),
    (rf"^(?:list\(dict\.keys\(|set\(){_LAZY}(?:\.keys\(\))?\)", _keys),
    (rf"^not {_NAME}$", _length),
    (rf"^len\({_LAZY}\)", _length),
    (rf"^'[^']*' (?:not )?in {_NAME}", _keys),
    (rf"^{_NAME} == (?P<value>{_NUMBER})\s*$", _number),
    (rf"^{_NAME} == (?P<value>'.*'|\".*\"|True|False)", _text),
    (rf"^{_NAME} is (?P<value>True|False)", _text),
    (rf"^{_NAME} is (?:not )?None", _none),
    (rf"^___check_obj_id\({_LAZY}, ", _identity),
    (rf"^___check_type_id\({_LAZY}, ", _type),
)
