"""The options of a training step that its program depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepOptions:
    """`accumulate`, `skip_nonfinite`, `compute_dtype`, `mode` and `backend` of `compile_training_step`, validated."""

    accumulate: int = 1
    skip_nonfinite: bool = True
    compute_dtype: torch.dtype | None = None
    mode: str | None = None
    backend: str = "inductor"

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(
                f"accumulate={self.accumulate!r} is not a number of micro-batches; give a whole number, at least 1."
            )
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise ValueError(
                f"compute_dtype={self.compute_dtype} is not a floating-point dtype; give torch.bfloat16, for example."
            )
