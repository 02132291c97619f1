"""Hooks that people register on parameters: those on gradients are obeyed, those after accumulation are refused."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._capture.by_running.leaves import leaf_like


def hooked_leaf(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A leaf with `value` that stands for `parameter`: with its own attributes, and with its gradient hooks."""
    leaf = leaf_like(parameter, value)
    for hook in _compat.gradient_hooks(parameter):
        leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    return leaf


class GradientHooks:
    """The hooks on a model's trainable parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self._registered: int | None = None
        self._read: list[object] | None = None

    def names(self) -> list[str]:
        """The parameters that have gradient hooks.

        Raises ValueError for a hook that a step cannot run: there is no accumulated gradient inside it.
        """
        for name, parameter in self._parameters.items():
            if _compat.hooks_after_accumulation(parameter):
                raise ValueError(
                    f"{name} {list(parameter.shape)} has a hook from register_post_accumulate_grad_hook(), which a "
                    f"step never calls: its gradients are not accumulated into .grad. Remove it; a change of the "
                    f"gradient belongs into parameter.register_hook(), an update into the optimizer."
                )
        return [name for name, p in self._parameters.items() if _compat.gradient_hooks(p)]

    def check(self, *, read: bool) -> None:
        """Refuse hooks that came after the step was compiled and that it would ignore.

        `read`: whether some program was captured by reading, which knows no gradient hooks. Costs one comparison while
        no hook of any kind is registered anywhere. Raises RuntimeError or ValueError.
        """
        registered = _compat.hooks_registered()
        if registered == self._registered:
            return
        names = self.names()
        if read and names:
            raise RuntimeError(
                f"a gradient hook was registered on {names[0]} after the step was compiled, and the program does not "
                f"run it. Register it before compile_training_step(), or compile the step again."
            )
        self._registered = registered
