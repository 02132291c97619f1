"""Rows: loops and trainers around the same small model. A loop takes the optimizer that it is given."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import fusion_compile as fc
from tests.real_programs.doors import LR, compared, facade_of, step_of
from tests.real_programs.program import Outcome, Program, Training
from tests.small_models import batches, mlp, squared_error

Loop = Callable[[Training, Any], list[Tensor]]
STEPS = 6
DATA = [*batches(STEPS)]


def _rate(step: int) -> float:
    """The share of the rate at a step: half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _one(training: Training, optimizer: Any, batch: tuple[Any, ...]) -> Tensor:
    optimizer.zero_grad()
    loss = training.loss_fn(training.model, *batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _scheduled(training: Training, optimizer: Any) -> list[Tensor]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    losses = []
    for batch in training.batches:
        losses.append(_one(training, optimizer, batch))
        schedule.step()
    return losses


def _accumulated(training: Training, optimizer: Any) -> list[Tensor]:
    losses = []
    for x, y in training.batches:
        optimizer.zero_grad()
        parts = [training.loss_fn(training.model, *pair) for pair in zip(x.chunk(2), y.chunk(2), strict=True)]
        for part in parts:
            (part / 2).backward()
        optimizer.step()
        losses.append(torch.stack([part.detach() for part in parts]).mean())
    return losses


def _clipped(training: Training, optimizer: Any) -> list[Tensor]:
    losses = []
    for batch in training.batches:
        optimizer.zero_grad()
        loss = training.loss_fn(training.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _autocast(training: Training, optimizer: Any) -> list[Tensor]:
    losses = []
    for batch in training.batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training.loss_fn(training.model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _scaled(training: Training, optimizer: Any) -> list[Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for batch in training.batches:
        optimizer.zero_grad()
        loss = training.loss_fn(training.model, *batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses


def _by_closure(training: Training, optimizer: Any) -> list[Tensor]:
    losses = []
    for batch in training.batches:

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = training.loss_fn(training.model, *batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return losses


def _averaged(training: Training, optimizer: Any) -> list[Tensor]:
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses = []
    for batch in training.batches:
        losses.append(_one(training, optimizer, batch))
        average.update_parameters(training.model)
    return [*losses, *(p.detach() for p in average.module.parameters())]


def _averaged_by_step() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        step = step_of(training)
        average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        losses = []
        for batch in training.batches:
            losses.append(step(*batch).clone())
            average.update_parameters(training.model)
        return [*losses, *(p.detach() for p in average.module.parameters())]

    return compared(_small(_averaged), run)


def _diffusers_average(training: Training, each: Callable[[Any], Tensor]) -> list[Tensor]:
    from diffusers.training_utils import EMAModel

    average = EMAModel(training.model.parameters(), decay=0.9, use_ema_warmup=True)
    losses = []
    for batch in training.batches:
        losses.append(each(batch))
        average.step(training.model.parameters())
    average.store(training.model.parameters())  # as its validation does
    average.copy_to(training.model.parameters())
    shown = training.loss_fn(training.model, *training.batches[0]).detach()
    average.restore(training.model.parameters())
    return [*losses, shown, *(p.clone() for p in average.shadow_params)]


def _diffusers_loop(training: Training, optimizer: Any) -> list[Tensor]:
    return _diffusers_average(training, lambda batch: _one(training, optimizer, batch))


def _diffusers_by_step() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        step = step_of(training)
        return _diffusers_average(training, lambda batch: step(*batch).clone())

    return compared(_small(_diffusers_loop), run)


def _resumed_by_step() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        first = step_of(training)
        losses = [first(*batch).clone() for batch in training.batches[:3]]
        saved = copy.deepcopy(first.state_dict())
        first.release()
        nn.init.zeros_(training.model.get_parameter("0.weight"))
        second = step_of(training)
        second.load_state_dict(saved)
        return losses + [second(*batch).clone() for batch in training.batches[3:]]

    return compared(_small(), run)


def _resumed_loop() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        first = facade_of(training.model)
        losses = [_one(training, first, batch) for batch in training.batches[:3]]
        saved = copy.deepcopy((first.state_dict(), training.model.state_dict()))
        nn.init.zeros_(training.model.get_parameter("0.weight"))
        second = facade_of(training.model)
        training.model.load_state_dict(saved[1])
        second.load_state_dict(saved[0])
        return losses + [_one(training, second, batch) for batch in training.batches[3:]]

    return compared(_small(), run)


def _accelerated(training: Training, optimizer: Any) -> list[Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(training.model, optimizer)
    losses = []
    for batch in training.batches:
        optimizer.zero_grad()
        loss = training.loss_fn(model, *batch)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _accelerated_by_step() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        from accelerate import Accelerator

        step = step_of(training._replace(model=Accelerator(cpu=True).prepare(training.model)))
        return [step(*batch).clone() for batch in training.batches]

    return compared(_small(), run)


class _Regression(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.net(x), y)}


def _transformers(training: Training, optimizer: Any) -> list[Tensor]:
    from transformers import Trainer, TrainingArguments

    rows = [{"x": x, "y": y} for batch in training.batches for x, y in zip(*batch, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=STEPS,
            save_strategy="no",
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            label_names=["y"],
            disable_tqdm=True,
            seed=7,
            logging_strategy="no",
        )
        model = _Regression(training.model)
        Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    return []


def _lightning(training: Training, optimizer: Any) -> list[Tensor]:
    import lightning.pytorch as pl

    losses: list[Tensor] = []

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = training.model

        def training_step(self, batch: Any, i: int) -> Tensor:
            loss = training.loss_fn(self.net, *batch)
            losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer

    _pl_trainer(pl).fit(Lit(), _loader(training))
    return losses


def _loader(training: Training) -> Any:
    data: Any = training.batches
    return DataLoader(data, batch_size=None)


def _pl_trainer(pl: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tempfile.gettempdir(), **quiet)


def _lightning_by_step() -> Outcome:
    def run(training: Training) -> list[Tensor]:
        import lightning.pytorch as pl

        from fusion_compile.integrations.lightning import CompiledTrainingModule

        class Lit(CompiledTrainingModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = training.model

            def compile_step(self) -> fc.TrainingStep:
                return step_of(training)

        _pl_trainer(pl).fit(Lit(), _loader(training))
        return []

    return compared(_small(lambda t, o: _plain(t, o)[:0]), run)


def _fabric(training: Training, optimizer: Any) -> list[Tensor]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(training.model, optimizer)
    losses = []
    for batch in training.batches:
        optimizer.zero_grad()
        loss = training.loss_fn(model, *batch)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _ignite(training: Training, optimizer: Any) -> list[Tensor]:
    from ignite.engine import Engine

    losses: list[Tensor] = []
    Engine(lambda _, batch: losses.append(_one(training, optimizer, batch))).run(training.batches)
    return losses


def _plain(training: Training, optimizer: Any) -> list[Tensor]:
    return [_one(training, optimizer, batch) for batch in training.batches]


def _small(loop: Loop | None = None, **options: Any) -> Callable[[], Training]:
    return lambda: Training(mlp(), squared_error, list(DATA), options, loop)


def _row(loop: Loop, **options: Any) -> Program:
    """The loop for the torch optimizer, and `options` of the step that say the same."""
    return Program(_small(loop, **options))


def _schedule_of_step(step: int) -> float:
    return LR * _rate(step)


_OWN_LOOP = ("step", "explain")
"""Doors that a row leaves out where a trainer owns forward and backward."""

PROGRAMS: dict[str, Program] = {
    "the plain loop": _row(_plain),
    "a schedule of torch": _row(_scheduled, lr=_schedule_of_step),
    "gradients added over micro-batches": _row(_accumulated, accumulate=2),
    "clip_grad_norm_": _row(_clipped, clip_grad_norm=0.1),
    "autocast in bfloat16": _row(_autocast, compute_dtype=torch.bfloat16),
    "GradScaler": Program(_small(_scaled), without=_OWN_LOOP),
    "optimizer.step(closure)": Program(_small(_by_closure), without=_OWN_LOOP),
    "AveragedModel of torch": Program(_small(_averaged), step=_averaged_by_step),
    "EMAModel of diffusers": Program(_small(_diffusers_loop), step=_diffusers_by_step),
    "saved and resumed half-way": Program(_small(), step=_resumed_by_step, facade=_resumed_loop),
    "accelerate": Program(_small(_accelerated), step=_accelerated_by_step),
    "transformers' Trainer": Program(_small(_transformers), without=_OWN_LOOP),
    "Lightning": Program(_small(_lightning), step=_lightning_by_step, without=("explain",), needs="lightning"),
    "Lightning Fabric": Program(_small(_fabric), without=_OWN_LOOP, needs="lightning"),
    "ignite": Program(_small(_ignite), without=_OWN_LOOP, needs="ignite"),
}
