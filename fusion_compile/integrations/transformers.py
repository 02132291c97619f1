"""Schedule-Free under ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusion_compile.integrations._averages import of_schedule_free


class ScheduleFreeCallback(TrainerCallback):
    """Put the average x into the model before the Trainer saves, and when training ends.

    The Trainer itself calls ``optimizer.train()`` before each step and ``optimizer.eval()`` before each evaluation. It
    does not before it saves: a checkpoint held the gradient point y, and so did the model after ``trainer.train()``.
    Optimizers of other kinds are left alone.

    Example:
        >>> from fusion_compile.integrations.transformers import ScheduleFreeCallback
        >>> callback = ScheduleFreeCallback()  # Trainer(…, callbacks=[callback])
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Switch to x if the Trainer now saves or evaluates, or if this was the last step, after which it may load the
        best weights. The next step switches back.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: What it does next.
            **kwargs: Among them ``optimizer``.
        """
        last = control.should_training_stop or state.global_step >= state.max_steps
        if control.should_save or control.should_evaluate or last:
            _switch(kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch to x, because the Trainer may save now.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: What it does next.
            **kwargs: Among them ``optimizer``.
        """
        _switch(kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave x in the model, for ``trainer.save_model()`` and whatever follows.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: What it does next.
            **kwargs: Among them ``optimizer``.
        """
        _switch(kwargs)


def _switch(given: dict[str, Any]) -> None:
    for optimizer in of_schedule_free([given.get("optimizer")]):
        optimizer.eval()
