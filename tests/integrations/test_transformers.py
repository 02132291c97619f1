"""transformers' own Trainer saves x, resumes bit for bit, and ends with x in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fusion_compile import optim
from fusion_compile.integrations.transformers import ScheduleFreeCallback
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, equal, loss_of, made, weights

DATA = [{"x": x[0], "y": y[0]} for x, y in batches(12, size=1)]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, (x, y))}


def begun(folder: Path, name: str = "sf_adamw", **options: Any) -> tuple[Regression, TorchOptimizer, Trainer]:
    model = Regression()
    optimizer = made(model, name)
    chosen = {"max_steps": 5, "save_steps": 2, "save_strategy": "steps", **options}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        label_names=["y"],
        disable_tqdm=True,
        seed=7,
        **chosen,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        optimizers=(optimizer, None),
        callbacks=[ScheduleFreeCallback()],
    )
    return model, optimizer, trainer


def the_average(model: nn.Module, optimizer: TorchOptimizer) -> dict[str, Tensor]:
    return {n: optimizer.state[p]["x"] for n, p in model.named_parameters()}


def test_what_is_saved_is_x_and_so_is_what_stays_in_the_model(tmp_path: Path) -> None:
    model, optimizer, trainer = begun(tmp_path)
    trainer.train()  # a warning is an error here
    assert not optimizer.training and optimizer.param_groups[0]["steps"] == 5
    assert equal(weights(model), the_average(model, optimizer))
    trainer.save_model(str(tmp_path / "last"))
    assert equal(load_file(tmp_path / "last" / "model.safetensors"), weights(model))
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        saved = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        x = {n: saved[i]["x"] for i, (n, _) in enumerate(model.named_parameters())}
        assert equal(load_file(folder / "model.safetensors"), x)


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(tmp_path: Path) -> None:
    whole, _, trainer = begun(tmp_path / "whole")
    trainer.train()
    resumed, optimizer, trainer = begun(tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert optimizer.param_groups[0]["steps"] == 5
    assert equal(weights(resumed), weights(whole))


def test_the_best_weights_stay_in_the_model(tmp_path: Path) -> None:
    """The Trainer loads them after the last step, which was none of evaluation: switching to x afterwards would have
    overwritten them."""
    options: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
    }
    model, _, trainer = begun(tmp_path, eval_steps=2, learning_rate=1.0, **options)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name in ("checkpoint-2", "checkpoint-4")
    assert equal(weights(model), load_file(best / "model.safetensors"))


@pytest.mark.parametrize("name", ["adamw"])
def test_other_recipes_are_left_alone(tmp_path: Path, name: str) -> None:
    model, optimizer, trainer = begun(tmp_path, name, max_steps=2)
    trainer.train()
    assert optimizer.training and optimizer.param_groups[0]["steps"] == 2
    assert not equal(weights(model), weights(Regression()))


def test_the_trainer_makes_the_optimizer_of_a_class_as_torchs(tmp_path: Path) -> None:
    """By ``optimizer_cls_and_kwargs``, with its own two groups of plain parameters, beside torch's AdamW."""
    found = []
    for cls, more in ((optim.AdamW, {"mode": "eager"}), (torch.optim.AdamW, {})):
        model = Regression()
        args = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            weight_decay=0.1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=7,
        )
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-7, **more}
        trainer = Trainer(model=model, args=args, train_dataset=DATA, optimizer_cls_and_kwargs=(cls, options))
        trainer.train()
        found.append(model)
    close_to_torch(*found)
