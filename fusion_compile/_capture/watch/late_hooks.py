"""Forward hooks that were registered after a step was read: Dynamo compares those alone that it saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_compile._capture.python_state._compat import global_module_hooks
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._compat import hooks_registered

_OF_MODULES = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


class LateHooks:
    """The hooks on every module that `roots` lead to, and those on all modules, as they are now.

    torch counts the hooks that are registered, of any kind. While the count stands still, a check is one comparison.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self._roots = dict(roots)
        self._before = self._now()
        self._registered = hooks_registered()

    def check(self) -> None:
        """Raise RuntimeError naming the first module on which a hook was registered since."""
        registered = hooks_registered()
        if registered == self._registered:
            return
        for label, hooks in self._now().items():
            if hooks - self._before.get(label, frozenset()):
                raise RuntimeError(
                    f"{label} was registered after the step was captured, and the program does not run it. Call "
                    f"step.recapture() after registering it, or remove it."
                )
        self._registered = registered

    def _now(self) -> dict[str, frozenset[int]]:
        """By what they are called, the identities of all hooks."""
        found = {f"a {what}": frozenset(map(id, hooks.values())) for what, hooks in global_module_hooks().items()}
        for label, module in Reach(self._roots).modules.values():
            for attribute, what in _OF_MODULES.items():
                hooks = vars(module).get(attribute) or {}
                found[f"a {what} on {label}"] = frozenset(map(id, hooks.values()))
        return found
