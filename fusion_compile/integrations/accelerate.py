"""Schedule-Free under ``accelerate.Accelerator``."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from fusion_compile.integrations._averages import averaged, kept


def save_averages(accelerator: Accelerator) -> None:
    """Make whatever `accelerator` saves of a model hold the average x.

    ``accelerator.save_state``, ``save_model`` and ``get_state_dict`` take the weights as they are, which is the
    gradient point y while training. From now on they take x, and the parameters hold y again when they return. Call
    ``optimizer.eval()`` and ``optimizer.train()`` around an evaluation, as without accelerate.

    Args:
        accelerator: It is changed. Optimizers that it prepares later count too, and other kinds are left alone.

    Raises:
        TypeError: It is no Accelerator.

    Example:
        >>> from accelerate import Accelerator
        >>> from fusion_compile.integrations.accelerate import save_averages
        >>> accelerator = Accelerator(cpu=True)
        >>> save_averages(accelerator)
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"save_averages() was given a {type(accelerator).__name__}; give the Accelerator.")
    if getattr(accelerator.get_state_dict, "of_averages", False):
        return
    taken = accelerator.get_state_dict

    def get_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
        with averaged(accelerator._optimizers):
            saved = taken(model, *args, **kwargs)
            return None if saved is None else kept(saved)

    get_state_dict.of_averages = True  # type: ignore[attr-defined]
    accelerator.get_state_dict = get_state_dict
