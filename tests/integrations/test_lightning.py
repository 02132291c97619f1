"""Lightning's own Trainer validates and saves x, resumes bit for bit, and finds a learning rate without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fusion_compile import optim
from tests.small_models import batches, mlp
from tests.torch_loops import equal, loss_of, made, weights

pytestmark = [
    pytest.mark.trainers,
    # Lightning warns of much about itself; of ours, each is an error.
    pytest.mark.filterwarnings("ignore", "error:.*Schedule-Free.*"),
]
pl = pytest.importorskip("lightning.pytorch", exc_type=ImportError)


def loader() -> Any:
    data = batches(12, size=1)
    return DataLoader(TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])), batch_size=2)


def lit(recipe: str = "sf_adamw", seen: list[Any] | None = None) -> Any:
    class Lit(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr = mlp(), 1e-2

        def training_step(self, batch: Any, i: int) -> Tensor:
            return loss_of(self.net, batch)

        def validation_step(self, batch: Any, i: int) -> None:
            if i == 0 and seen is not None:
                seen.append(weights(self.net))
            self.log("val", loss_of(self.net, batch))

        def configure_optimizers(self) -> Any:
            return made(self.net.named_parameters(), recipe, lr=self.lr)

    return Lit()


def trainer_in(folder: Path, **options: Any) -> Any:
    from fusion_compile.integrations.lightning import ScheduleFreeCallback

    callbacks = [*options.pop("callbacks", []), ScheduleFreeCallback()]
    chosen = {"max_epochs": 2, "enable_checkpointing": True, **options}
    return pl.Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **chosen,
    )


def by_hand(epochs: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The ordinary loop: x after each epoch, and x at the end."""
    model = mlp()
    optimizer = made(model, "sf_adamw", lr=1e-2)
    seen = []
    for _ in range(epochs):
        for batch in loader():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        optimizer.eval()
        seen.append(weights(model))
        optimizer.train()
    optimizer.eval()
    return seen, weights(model)


def net_of(saved: Any) -> dict[str, Tensor]:
    return {n.removeprefix("net."): t for n, t in saved["state_dict"].items()}


def test_validation_and_checkpoints_see_x_and_the_run_is_the_ordinary_loops(tmp_path: Path) -> None:
    seen: list[Any] = []
    model = lit(seen=seen)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)

    class Bare(pl.Callback):  # type: ignore[name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "bare.ckpt", weights_only=True)

    trainer = trainer_in(tmp_path, callbacks=[saving, Bare()])
    trainer.fit(model, loader(), loader())  # a warning is an error here
    of_epochs, end = by_hand(2)
    assert all(equal(ours, theirs) for ours, theirs in zip(seen, of_epochs, strict=True))
    assert equal(weights(model.net), end), "x stays in the model"
    for epoch, x in enumerate(of_epochs):
        assert equal(net_of(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=False)), x)
    assert equal(net_of(torch.load(tmp_path / "bare.ckpt", weights_only=False)), end)
    assert "lightning_module_state_dict" not in vars(trainer.strategy)


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer_in(tmp_path, callbacks=[saving], max_epochs=1).fit(lit(), loader(), loader())
    model = lit()
    trainer_in(tmp_path).fit(model, loader(), loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), weights_only=False)
    assert equal(weights(model.net), by_hand(2)[1])


@pytest.mark.parametrize("recipe", ["adamw", "sf_adamw"])
def test_the_search_for_a_learning_rate_leaves_the_start_as_it_was(tmp_path: Path, recipe: str) -> None:
    model = lit(recipe)
    start = copy.deepcopy(weights(model.net))
    trainer = trainer_in(tmp_path)
    finder = pl.tuner.Tuner(trainer).lr_find(model, loader(), num_training=10, min_lr=1e-4, max_lr=1e-1)
    assert finder is not None and len(finder.results["lr"]) == 10
    assert equal(weights(model.net), start)
    model.lr = 1e-2
    trainer.fit(model, loader())
    if recipe == "sf_adamw":
        assert equal(weights(model.net), by_hand(2)[1])


def test_a_layer_that_is_unfrozen_later_joins_with_plain_parameters(tmp_path: Path) -> None:
    """``BaseFinetuning`` adds a group of plain parameters."""

    class Unfreeze(pl.callbacks.BaseFinetuning):  # type: ignore[name-defined]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=1e-3)

    class Lit(type(lit())):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return made([(n, p) for n, p in self.net.named_parameters() if p.requires_grad], "sf_adamw", lr=1e-2)

    model = Lit()
    start = weights(model.net)
    trainer = trainer_in(tmp_path, callbacks=[Unfreeze()])
    trainer.fit(model, loader())
    assert [len(g["params"]) for g in trainer.optimizers[0].param_groups] == [2, 2]
    assert [g["steps"] for g in trainer.optimizers[0].param_groups] == [12, 6]
    moved = weights(model.net)
    assert not any(torch.equal(moved[n], t) for n, t in start.items())


def compiled_module(recipe: str = "adamw") -> Any:
    from fusion_compile import compile_training_step
    from fusion_compile.integrations.lightning import CompiledTrainingModule

    class Compiled(CompiledTrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def compile_step(self) -> Any:
            chosen = optim.RECIPES[recipe](lr=1e-2)
            return compile_training_step(self.net, lambda m, x, y: loss_of(m, (x, y)), optimizer=chosen, mode="eager")

        def validation_step(self, batch: Any, i: int) -> None:
            self.log("val", loss_of(self.net, batch))

    return Compiled()


@pytest.mark.parametrize("recipe", ["adamw", "sf_adamw"])
def test_a_compiled_training_step_counts_stops_saves_and_resumes(tmp_path: Path, recipe: str) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")
    model = compiled_module(recipe)
    trainer = trainer_in(tmp_path, callbacks=[saving], max_epochs=-1, max_steps=9)
    trainer.fit(model, loader(), loader())
    assert trainer.global_step == 9 and model.compiled.steps_called == 9
    assert sorted(path.name for path in tmp_path.glob("step=*.ckpt")) == [f"step={i}.ckpt" for i in (3, 6, 9)]
    assert {"train_loss", "val"} <= trainer.callback_metrics.keys()

    reference = mlp()
    if recipe == "adamw":
        optimizer: Any = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    else:
        optimizer = made(reference, recipe, lr=1e-2)
    data = [*loader(), *loader()][:9]
    for batch in data:
        optimizer.zero_grad()
        loss_of(reference, batch).backward()
        optimizer.step()
    if recipe != "adamw":
        optimizer.eval()
        assert equal(weights(model.net), weights(reference))
    else:
        for p, q in zip(model.net.parameters(), reference.parameters(), strict=True):
            # a few roundings of fp32 on weights below 1, through a division by √v
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    again = compiled_module(recipe)  # from the end of an epoch, as Lightning begins the loader anew
    trainer = trainer_in(tmp_path, max_epochs=-1, max_steps=9)
    trainer.fit(again, loader(), loader(), ckpt_path=str(tmp_path / "step=6.ckpt"), weights_only=False)
    assert trainer.global_step == 9 and again.compiled.steps_called == 9
    assert equal(weights(again.net), weights(model.net))
