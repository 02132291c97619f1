"""What the user's functions read during a real run.

Profile events tell which functions run and with which arguments; their bytecode tells which names they read; both
together lead to slots. Nothing of the user's is called to find them.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.attributes import attribute_slots, instance_dict, item_slot
from fusion_compile._capture.python_state.bytecode import Chain, chains
from fusion_compile._capture.python_state.slots import MISSING, WHOLE, Slot, read
from fusion_compile._capture.python_state.whose_code import is_foreign, reads_count

_STANDARD = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)
_CONTAINERS = (dict, list, tuple, set, frozenset)
_SAMPLE = Slot({}, None, "")
_UNCOUNTED = sys.getrefcount(_SAMPLE.holder) - 1
"""References that `sys.getrefcount` counts besides a slot's own."""


class Reads:
    """What was read.

    Attributes:
        slots: Each once, in the order of reading. The key `WHOLE` stands for all attributes of an object, in
            its dictionary.
        names: Every attribute's name and every string in the code that ran. Any other name was computed, or not read.

    `globals_alone`: leave out what was read of arguments and other locals, which costs less.
    """

    def __init__(self, *, globals_alone: bool = False) -> None:
        self._globals_alone = globals_alone
        self.slots: list[Slot] = []
        self.names: set[str] = set()
        self._known: set[tuple[int, Any]] = set()
        self._seen: set[Any] = set()
        self._codes: set[types.CodeType] = set()

    def on_event(self, frame: types.FrameType, event: str, _: Any) -> None:
        """A profile event. Arguments are resolved when a function begins; other locals when it returns."""
        if event not in ("call", "return") or not reads_count(frame.f_code.co_filename):
            return
        code = frame.f_code
        if self._globals_alone:
            if (code, id(frame.f_globals)) not in self._seen:
                self._seen.add((code, id(frame.f_globals)))
                for chain in chains(code):
                    if chain.scope == "global":
                        self._follow_global(chain, frame.f_globals)
            return
        if code not in self._codes:
            self._codes.add(code)
            self.names.update(code.co_names)
            self.names.update(c for c in code.co_consts if isinstance(c, str))
        found = chains(code)
        if not found:
            return
        values = frame.f_locals
        # Containers are left out: those that are passed around are mostly new at each call.
        key = (code, event, *(id(v) for v in values.values() if not isinstance(v, _PLAIN + _CONTAINERS)))
        if key in self._seen:
            return
        self._seen.add(key)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for chain in found:
            if chain.scope == "global":
                if event == "call":
                    self._follow_global(chain, frame.f_globals)
            elif chain.name in values and (event == "return" or chain.scope == "free" or chain.name in arguments):
                self._follow(chain, values[chain.name], chain.name)

    def drop_temporaries(self) -> None:
        """Forget slots in objects that nobody else refers to: what the run made and threw away, with all the
        activations in it."""
        self._seen.clear()
        self._known.clear()
        while True:
            ours = Counter(id(slot.holder) for slot in self.slots)
            kept = [slot for slot in self.slots if sys.getrefcount(slot.holder) > ours[id(slot.holder)] + _UNCOUNTED]
            if len(kept) == len(self.slots):
                return
            self.slots = kept

    def _follow_global(self, chain: Chain, scope: dict[str, Any]) -> None:
        if chain.name in scope:
            value = scope[chain.name]
            if not is_foreign(value):
                self._note(Slot(scope, chain.name, chain.name))
            self._follow(chain, value, chain.name)

    def _follow(self, chain: Chain, value: Any, label: str) -> None:
        if isinstance(value, contextvars.ContextVar):
            self._note(Slot(value, None, label))
            return
        for link in chain.links:
            if isinstance(value, (Tensor, torch.dtype, type(None))) or (is_foreign(value) and value is not os):
                return
            if link.kind == "all":
                own = instance_dict(value)
                if own is not None and not isinstance(value, (type, types.ModuleType)):
                    self._note(Slot(own, WHOLE, label))
                return
            if link.kind == "item":
                slot = item_slot(value, link.key, label)
                slots = [slot] if slot is not None else []
            else:
                slots = attribute_slots(value, link.key, label)
            if not slots:
                return
            for slot in slots:
                self._note(slot)
            value, label = read(slots[-1]), slots[-1].label if link.kind == "item" else f"{label}.{link.key}"
            if value is MISSING or inspect.isdatadescriptor(value) or isinstance(value, (staticmethod, classmethod)):
                return

    def _note(self, slot: Slot) -> None:
        if slot.holder is vars(os) or (isinstance(slot.key, str) and slot.key in _STANDARD):
            return
        if isinstance(slot.holder, type) and is_foreign(slot.holder) and slot.key != "forward":
            return
        if slot.identity not in self._known:
            self._known.add(slot.identity)
            self.slots.append(slot)


@contextlib.contextmanager
def reading(*, globals_alone: bool = False) -> Iterator[Reads]:
    """Record what the user's functions read inside, in this thread. A profiler that was set is set again at the end.

    `globals_alone`: as of `Reads`.
    """
    reads, before = Reads(globals_alone=globals_alone), sys.getprofile()
    sys.setprofile(reads.on_event)
    try:
        yield reads
    finally:
        sys.setprofile(None)
        if before is None or callable(before):
            sys.setprofile(before)
        else:
            before.enable()  # a C profiler: what `sys.getprofile` gives back is no function
        reads.drop_temporaries()
