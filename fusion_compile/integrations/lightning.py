"""Schedule-Free and compiled training steps under Lightning's Trainer."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from fusion_compile.integrations._averages import averaged, kept, of_schedule_free
from fusion_compile.integrations._step_optimizer import StepOptimizer
from fusion_compile.training_step import TrainingStep

# Both packages are Lightning, with classes of their own. The one that the user has imported counts.
_HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None
if "pytorch_lightning" in sys.modules and ("lightning.pytorch" not in sys.modules or not _HAS_LIGHTNING):
    import pytorch_lightning as pl
elif _HAS_LIGHTNING:
    import lightning.pytorch as pl
else:
    raise ModuleNotFoundError("fusion_compile.integrations.lightning needs Lightning: pip install lightning.")


class ScheduleFreeCallback(pl.Callback):
    """Put the average x into the model while the Trainer validates and saves, and when training ends.

    A checkpoint, also a weights-only one, holds x; the optimizer's state in it holds x and z, so a resumed run goes on
    bit for bit. Optimizers of other kinds are left alone.

    Give it to the Trainer, ``Trainer(callbacks=[ScheduleFreeCallback()])``.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints take x.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            stage: What begins.
        """
        strategy = trainer.strategy
        if "lightning_module_state_dict" in vars(strategy):
            return
        taken = strategy.lightning_module_state_dict

        # A callback's on_save_checkpoint is not called for weights-only checkpoints.
        def lightning_module_state_dict() -> dict[str, Any]:
            with averaged(trainer.optimizers):
                return kept(taken())

        strategy.lightning_module_state_dict = lightning_module_state_dict

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the Trainer as it was.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            stage: What ends.
        """
        vars(trainer.strategy).pop("lightning_module_state_dict", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train at y.

        Args:
            trainer: The Trainer.
            pl_module: The model.
        """
        _switch(trainer, True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate x.

        Args:
            trainer: The Trainer.
            pl_module: The model.
        """
        _switch(trainer, False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on at y, if the Trainer trains.

        Args:
            trainer: The Trainer.
            pl_module: The model.
        """
        if trainer.state.fn == "fit":
            _switch(trainer, True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave x in the model.

        Args:
            trainer: The Trainer.
            pl_module: The model.
        """
        _switch(trainer, False)


def _switch(trainer: pl.Trainer, training: bool) -> None:
    for optimizer in of_schedule_free(trainer.optimizers):
        optimizer.train(training)


class CompiledTrainingModule(pl.LightningModule):
    """A LightningModule whose training step is one compiled program.

    Under manual optimization Lightning counts the steps of its optimizers. A compiled step has none of them, so
    ``trainer.global_step`` stayed 0, and ``max_steps`` and checkpoints by steps never acted. This module takes the step
    inside of an optimizer's.

    Write ``compile_step``, and what you like besides: validation, other callbacks, and schedulers in
    ``configure_optimizers``, which you may extend (``optimizer = super().configure_optimizers()``). A scheduler is
    stepped by you (``self.lr_schedulers().step()``), as always under manual optimization. The model holds what is
    deployed at any time, so nothing has to be switched under Schedule-Free. The step's state is in the checkpoint, and
    a resumed run goes on bit for bit.

    Attributes:
        compiled: The training step, from ``configure_optimizers`` on.
    """

    compiled: TrainingStep

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def compile_step(self) -> TrainingStep:
        """Make the training step: ``return compile_training_step(self.net, loss_fn)``. The model is on its
        device.

        Returns:
            The training step.

        Raises:
            NotImplementedError: You did not write it.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks compile_step(); return compile_training_step(…) there.")

    def batch_arguments(self, batch: Any) -> tuple[Any, ...]:
        """What the training step is called with.

        Args:
            batch: Of the loader.

        Returns:
            The entries of a tuple or list, or else the batch itself.
        """
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,)

    def configure_optimizers(self) -> Any:
        """Compile the step, and hand it to Lightning as an optimizer.

        Returns:
            The optimizer; ``param_groups`` show the step's numbers.
        """
        self.compiled = self.compile_step()
        return StepOptimizer(self.compiled)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Take one step, and log its loss as ``train_loss``.

        Args:
            batch: Of the loader.
            batch_idx: Its number.

        Returns:
            The loss, 0-dim.
        """
        arguments = self.batch_arguments(batch)
        loss = self.optimizers().step(closure=lambda: self.compiled(*arguments))
        self.log("train_loss", loss)
        return loss
