"""The meaning of a failed guard, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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


def size_words(places: Sequence[tuple[str, int]], before: str, now: str) -> Words:
    """Describe a size that changed from `before` to `now`. `places`: the tensors and their dimensions that have it."""
    changed = " and ".join(f"dimension {at} of {name}" for name, at in places)
    marks = " and ".join(f"torch._dynamo.mark_dynamic({name}, {at})" for name, at in places)
    remedy = f"Pad or bucket to one size (DataLoader(drop_last=True)), or declare before the first call: {marks}."
    if all("." in name for name, _ in places):
        remedy = f"Hold it at one size: allocate the largest once and write into a part of it, or declare: {marks}."
    return Words(
        "dynamic_shape",
        ", ".join(f"{name}.shape[{at}]" for name, at in places),
        f"The size of {changed} changed (from {before} to {now}), {_AGAIN}",
        remedy,
    )


def number_words(name: str, before: str, now: str = "") -> Words:
    """Describe a Python number that changed from `before` to `now`."""
    return Words(
        "python_scalar",
        name,
        f"{name} is a Python number. It was {before} when the program was compiled and then changed"
        f"{f' to {now}' if now else ''}, {_AGAIN}",
        "Pass it as a 0-dim tensor on the program's device, and write new values with fill_.",
    )


def counter_words(name: str, *, is_read: bool) -> Words:
    """Describe a Python number that the program itself counts on at every call. `is_read`: by anything else."""
    remedy = "Nothing else in its file reads it: remove it, or count outside the compiled function."
    if is_read:
        remedy = (
            "Count outside the compiled function. If the program needs the count, keep it in a buffer "
            "(torch.zeros((), dtype=torch.int64)) and count it on with add_(1)."
        )
    return Words("python_scalar", name, f"{name} is a Python number that every call counts on, {_AGAIN}", remedy)


def _tensor(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name, what, detail = found["name"], found["what"], found["detail"].strip()
    said = re.search(r"expected (?P<before>.+?), actual (?P<now>.+)", detail)
    before, now = (said["before"], said["now"]) if said else ("", "")
    if what == "size":
        return size_words([(name, int(found["detail"].split("index ")[1].split(".")[0]))], before, now)
    if what == "dispatch key set":
        return _keys_of_dispatch(name, before, now)
    if what == "requires_grad":
        before = str("requires_grad=1" in detail)
        now = str("requires_grad=0" in detail)
    if what == "dtype":
        before, now = (_DTYPES.get(dtype, dtype) for dtype in (before, now))
    why = f"The {_WHAT.get(what, what)} of {name} changed (from {before} to {now}), {_AGAIN}"
    return Words("recompile", name, why, f"Give {name} the same {_WHAT.get(what, what)} at every call.")


_WHAT = {"rank": "number of dimensions", "stride": "memory layout", "device index": "device"}
_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
_BACKENDS = ("CPU", "CUDA", "XPU", "MPS", "HIP", "Meta")


def _keys_of_dispatch(name: str, before: str, now: str) -> Words:
    """Describe a tensor whose dispatch keys changed: its device, whether autograd can follow it, or its class."""
    keys = [set(re.findall(r"\w+", text)) - {"DispatchKeySet"} for text in (before, now)]
    devices = [next((b for b in _BACKENDS if b in each), "") for each in keys]
    recorded = [any(key.startswith("Autograd") for key in each) for each in keys]
    if devices[0] != devices[1]:
        why = f"{name} lay on {devices[0]} when the program was compiled and then on {devices[1]}"
        remedy = f"Give {name} on the same device at every call."
    elif recorded[0] != recorded[1]:
        was, then = ("an ordinary tensor", "one made under torch.inference_mode")[:: 1 if recorded[0] else -1]
        why = f"{name} was {was} when the program was compiled and then {then}"
        remedy = f"Make {name} the same way at every call; .clone() outside of inference_mode gives an ordinary tensor."
    else:
        named = ", ".join(sorted(keys[0] ^ keys[1])) or "its subclass"
        why = f"{name} was another kind of tensor when the program was compiled (what differs: {named})"
        remedy = f"Give {name} as the same kind of tensor at every call."
    return Words("recompile", name, f"{why}, {_AGAIN}", remedy)


def _class_of_tensor(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name, now = found["name"], found["now"].rpartition(".")[2]
    return Words(
        "recompile",
        name,
        f"{name} was a Tensor when the program was compiled and then a {now}, {_AGAIN}",
        f"Give {name} the same type at every call.",
    )


def _item(found: re.Match[str], types: Mapping[str, str]) -> Words:
    name = found["name"]
    return Words(
        "host_sync",
        name,
        f"The program reads the value of {name} on the CPU, which waits for the device. With another value than "
        f"{found['value']} it was compiled again.",
        f"Keep {name} a tensor: index with a tensor (index_copy_, scatter_), torch.where instead of if.",
    )


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
    return number_words(name, found["value"])


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
    if name.rpartition(".")[2] == "training":
        mode = {"True": "train", "False": "eval"}[found["value"]]
        return Words(
            "recompile",
            name,
            f"The program was compiled in {mode} mode, and train() or eval() changed the mode, {_AGAIN}",
            "Each mode is a program of its own, and both are kept: it is compiled once for each. Call both once before "
            "the loop, or switch the mode outside of what is compiled.",
        )
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


_NAME = r"(?P<name>[A-Za-z_][\w.\[\]'\"…]*)"
_LAZY = r"(?P<name>[A-Za-z_][\w.\[\]'\"…]*?)"
_ROWS: tuple[tuple[str, _Say], ...] = (
    (rf"^expected type of '{_LAZY}' to be a tensor type, ' but found <class '(?P<now>[^']+)'>", _class_of_tensor),
    (
        rf"^tensor '?{_LAZY}'? (?P<what>size|rank|stride|dtype|requires_grad|dispatch key set|device(?: index)?) "
        r"mismatch(?P<detail>.*)",
        _tensor,
    ),
    (r"GLOBAL_STATE changed:(?P<what>.*)", _state),
    (r"Cache line invalidated because ___stack\d+ got deallocated", _rest),
    (rf"^{_LAZY}\.item\(\) == (?P<value>{_NUMBER})\s*$", _item),
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
