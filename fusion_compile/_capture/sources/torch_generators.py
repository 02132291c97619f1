"""Random generators of torch that operators are given during a run, and those of them that were made inside."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fusion_compile._capture.sources.who_asks import innermost_user, is_torch, line_of

_OUR_REFERENCES = 3
"""The tuple that keeps a generator, the loop's variable and the argument of `sys.getrefcount`."""


class GeneratorsSeen(TorchFunctionMode):
    """Inside, every generator that is handed to a function of torch is remembered with the user's line."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[torch.Generator, str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = kwargs.get("generator") if kwargs else None
        if isinstance(generator, torch.Generator) and id(generator) not in self._seen:
            frame = sys._getframe(1)
            if not is_torch(frame.f_code.co_filename, "utils/data/"):  # a sampler's own
                self._seen[id(generator)] = (generator, line_of(innermost_user(frame)))
        return func(*args, **(kwargs or {}))

    def made_inside(self) -> list[str]:
        """After the run, the lines that used a generator which nobody holds any more."""
        where = []
        for pair in list(self._seen.values()):
            generator, line = pair
            if sys.getrefcount(generator) <= _OUR_REFERENCES:
                where.append(line)
        self._seen.clear()
        return where
