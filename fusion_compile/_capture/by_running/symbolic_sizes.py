"""Symbols in the place of sizes while a function runs on fake tensors, so that one graph serves a band of sizes.

What user code decides by a size (a branch, a position code's length) is an assumption of the graph: torch writes down
every question that is asked of a symbol, and the graph is right for the sizes that answer alike.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from fusion_compile._capture.by_running import _compat
from fusion_compile._capture.python_state.whose_code import is_user_code


class SizeFixed(ValueError):
    """A size that was to be a symbol is one number; the sentence says at which line."""


class SymbolicSizes:
    """The sizes of one trace's inputs that are symbols.

    `inputs`: real tensors. `sizes`: ``(input, axis)`` of those sizes.

    Attributes:
        fakes: What is traced in the place of `inputs`.
    """

    def __init__(self, inputs: Sequence[Tensor], sizes: Collection[tuple[int, int]]) -> None:
        self._sizes = sorted(sizes)
        self.fakes, self._env = _compat.fakes_with_symbols(inputs, sizes)
        self._line = ""
        self._holds: Callable[[Sequence[Tensor]], bool] | None = None

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Around the trace: the line that fixes a size is noticed. Raises SizeFixed at its end if there is one."""
        with _compat.questions_about_sizes(self._env, self._asked):
            yield
        self.refuse_fixed()

    def beside(self, tensor: Tensor) -> Tensor:
        """What a compiler is given in the place of a constant of the graph."""
        return _compat.fake_beside(self.fakes[0], tensor)

    def settle(self) -> None:
        """After the compiler, which assumes things, too: what was assumed until now is what `fit` asks. Raises
        SizeFixed if a size is a number now."""
        self.refuse_fixed()
        self._holds = _compat.assumptions(self._env, self.fakes)

    def fit(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph is right for `inputs`."""
        return self._holds is not None and self._holds(inputs)

    def refuse_fixed(self) -> None:
        """Raise SizeFixed if a size is one number for the graph."""
        if not all(_compat.is_symbol(self.fakes[i].shape[axis]) for i, axis in self._sizes):
            raise SizeFixed(f"torch fixes a size{self._line}.")

    def _asked(self) -> None:
        if not self._line and not all(_compat.is_symbol(self.fakes[i].shape[axis]) for i, axis in self._sizes):
            frames = [frame for frame in traceback.extract_stack() if is_user_code(frame.filename)]
            if frames:
                self._line = f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
