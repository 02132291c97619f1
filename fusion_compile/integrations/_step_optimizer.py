"""A compiled training step in the form of a ``torch.optim.Optimizer``, for trainers that count an optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusion_compile.training_step import TrainingStep


class StepOptimizer(torch.optim.Optimizer):
    """Its ``step(closure)`` calls the closure, which calls the training step; the update happens in there.

    ``param_groups`` show the training step's numbers, and a scheduler that writes one there sets it for the next step.
    Its state is the training step's without the model, which trainers save and load themselves, and before.

    `training_step`: the compiled step; its model's trainable parameters are the one group's.
    """

    def __init__(self, training_step: TrainingStep) -> None:
        self.training_step = training_step
        parameters = [p for p in training_step.model.parameters() if p.requires_grad]
        super().__init__(parameters, _shown(training_step))
        self._seen = _shown(training_step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call `closure`, which takes the training step, and return what it returns. TypeError without one."""
        if closure is None:
            raise TypeError(
                "a compiled training step is taken in the closure: optimizer.step(closure=lambda: step(*batch))."
            )
        options = self.param_groups[0]
        written = {n: options[n] for n, seen in self._seen.items() if options[n] != seen}
        self.training_step.hyperparameters.update(written)
        self._seen |= written
        return closure()

    def state_dict(self) -> dict[str, Any]:
        """The groups' options, and the training step's state without its model."""
        state = {key: part for key, part in self.training_step.state_dict().items() if key != "model"}
        return {**super().state_dict(), "training_step": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave, for the model as it is now."""
        if "training_step" not in state_dict:
            raise ValueError("this is no compiled training step's state: it lacks 'training_step'.")
        model = self.training_step.state_dict()["model"]
        self.training_step.load_state_dict({**state_dict["training_step"], "model": model})
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._seen = {n: self.param_groups[0][n] for n in self._seen}


def _shown(training_step: TrainingStep) -> dict[str, float]:
    """The step's numbers; of a schedule its first value."""
    numbers = training_step.hyperparameters
    return {n: float(value(0)) if callable(value) else float(value) for n, value in numbers.items()}
