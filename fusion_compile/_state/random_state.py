"""torch's random state in a checkpoint: read, checked without touching the generators, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_compile._types import Tensors


class RandomState:
    """A saved random state, ``{"cpu": bytes, "cuda": bytes}``, checked. What it lacks stays as it is.

    Args:
        saved: Each a ``uint8`` tensor as ``torch.get_rng_state`` gives.
        device: The step's. A state of ``"cuda"`` counts on CUDA only.

    Raises ValueError for bytes that are no state of the generator.
    """

    def __init__(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        self._device = device
        self._states: Tensors = {
            kind: saved[kind].cpu() for kind in ("cpu", "cuda") if kind in saved and kind in ("cpu", device.type)
        }
        for kind, state in self._states.items():
            try:
                torch.Generator(device=device if kind == "cuda" else "cpu").set_state(state)
            except (RuntimeError, TypeError) as error:
                why = str(error).partition("\n")[0].rstrip(".")
                raise ValueError(
                    f"rng {kind} {list(state.shape)} {state.dtype} is no state of torch's generator ({why}); nothing "
                    f"was loaded. Give what state_dict() gave."
                ) from error

    @staticmethod
    def now(device: torch.device) -> Tensors:
        """The present state, as it is saved."""
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return states

    def put(self) -> None:
        """Put the state into torch's generators."""
        if "cpu" in self._states:
            torch.set_rng_state(self._states["cpu"])
        if "cuda" in self._states:
            torch.cuda.set_rng_state(self._states["cuda"], self._device)
