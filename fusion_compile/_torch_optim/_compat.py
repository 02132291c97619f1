"""Private torch API of the torch optimizer: what Dynamo tells when it compiles."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class OnCompile:
    """Calls `callback` each time that Dynamo begins to compile, until `remove`. Where torch does not tell, never."""

    def __init__(self, callback: Callable[[], None]) -> None:
        def begins(*_: object) -> None:
            callback()

        self._begins = begins
        self._handler: Any = _handler()
        self.listen()

    def listen(self) -> None:
        """Be sure that it is called: ``torch.compiler.reset()`` forgets callbacks."""
        if self._handler is not None and self._begins not in self._handler.start_callbacks:
            self._handler.register_start_callback(self._begins)

    def remove(self) -> None:
        """Call it no more."""
        if self._handler is not None and self._begins in self._handler.start_callbacks:
            self._handler.remove_start_callback(self._begins)
        self._handler = None


def _handler() -> Any:
    try:
        return importlib.import_module("torch._dynamo.callback").callback_handler
    except (ImportError, AttributeError):
        return None
