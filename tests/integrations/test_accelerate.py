"""accelerate's own Accelerator saves x, while the loop goes on at y."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from fusion_compile.integrations.accelerate import save_averages
from tests.small_models import batches, mlp
from tests.torch_loops import equal, loss_of, made, weights


def loop(accelerator: Any, model: Any, optimizer: Any, data: Any) -> None:
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        optimizer.step()


def begun(name: str = "sf_adamw") -> tuple[Any, Any, Any]:
    accelerator = Accelerator(cpu=True)
    save_averages(accelerator)
    save_averages(accelerator)  # once is enough, twice does no harm
    model, optimizer = accelerator.prepare(mlp(), None)[0], None
    optimizer = accelerator.prepare(made(model, name))
    return accelerator, model, optimizer


def test_what_is_saved_is_x_and_the_run_goes_on_at_y(tmp_path: Path) -> None:
    accelerator, model, optimizer = begun()
    loop(accelerator, model, optimizer, batches(3))
    y, x = weights(model), {n: optimizer.state[p]["x"].clone() for n, p in model.named_parameters()}
    taken = accelerator.get_state_dict(model)
    accelerator.save_model(model, str(tmp_path / "model"))
    accelerator.save_state(str(tmp_path / "state"))  # a warning is an error here
    for saved in (taken, *(load_file(tmp_path / f / "model.safetensors") for f in ("model", "state"))):
        assert equal(saved, x)
    assert equal(weights(model), y) and not equal(x, y)
    loop(accelerator, model, optimizer, batches(5)[3:])
    end = weights(model)

    accelerator, model, optimizer = begun()
    accelerator.load_state(str(tmp_path / "state"))
    loop(accelerator, model, optimizer, batches(5)[3:])
    assert equal(weights(model), end), "a resumed run is bitwise the one that went on"


def test_other_optimizers_and_other_objects() -> None:
    accelerator = Accelerator(cpu=True)
    save_averages(accelerator)
    model = mlp()
    accelerator.prepare(torch.optim.AdamW(model.parameters()))
    assert equal(accelerator.get_state_dict(model), weights(model))
    with pytest.raises(TypeError, match="was given a Sequential; give the Accelerator"):
        save_averages(model)
