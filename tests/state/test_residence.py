"""The module's parameters lie in banks, and nobody need know: saving, copying and reading them work as ever."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import fusion_compile as fc
from tests.small_models import assert_same_weights, batches, compiled, mlp, naming, squared_error, torch_loop

PICKLE_PER_TENSOR = 4096
"""Bytes that torch.save spends on one tensor besides its entries: name, alignment, zip entry."""


def wide() -> nn.Sequential:
    """Three 32 x 32 layers and a head: big enough to tell a layer from a bank in a file's size."""
    return nn.Sequential(nn.Linear(4, 32), *(nn.Linear(32, 32) for _ in range(3)), nn.Tanh(), nn.Linear(32, 2))


def trained(model: nn.Module, steps: int = 2, **options: Any) -> fc.TrainingStep:
    step = compiled(model, **{"mode": "eager", **options})
    for batch in batches(steps):
        step(*batch)
    return step


def size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.fixture(params=["adamw", "sf_normuon"])
def step(request: pytest.FixtureRequest) -> fc.TrainingStep:
    """A step whose weights lie in one flat bank, and one whose layers are stacked."""
    spectral = [r"[123]\.weight"] if request.param == "sf_normuon" else []
    torch.manual_seed(0)
    return trained(wide(), optimizer=request.param, force_spectral=spectral)


# ---------------------------------------------------------------------- saving


def test_a_saved_state_dict_is_no_larger_than_the_weights(step: fc.TrainingStep, tmp_path: Path) -> None:
    tensors = step.model.state_dict()
    torch.save(tensors, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size <= size_of(tensors) + PICKLE_PER_TENSOR * len(tensors)
    fresh = wide()
    fresh.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert_same_weights(fresh, step.model, rtol=0, atol=0)


def test_a_saved_layer_is_no_larger_than_the_layer(step: fc.TrainingStep) -> None:
    """Not the whole bank that it lies in."""
    for part in (step.model.get_submodule("2").state_dict(), {"weight": step.model.get_parameter("2.weight")}):
        file = io.BytesIO()
        torch.save(part, file)
        assert file.tell() <= size_of(part) + PICKLE_PER_TENSOR * len(part) < size_of(step.model.state_dict())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True)["weight"], step.model.get_parameter("2.weight"))


def test_safetensors_saves_the_model_and_its_state_dict(step: fc.TrainingStep, tmp_path: Path) -> None:
    save_model(step.model, str(tmp_path / "model.safetensors"))
    save_file(step.model.state_dict(), tmp_path / "dict.safetensors")
    fresh = wide()
    load_model(fresh, str(tmp_path / "model.safetensors"))
    assert_same_weights(fresh, step.model, rtol=0, atol=0)
    fresh = wide()
    fresh.load_state_dict(load_file(tmp_path / "dict.safetensors"))
    assert_same_weights(fresh, step.model, rtol=0, atol=0)
    assert (tmp_path / "model.safetensors").stat().st_size <= size_of(step.model.state_dict()) + PICKLE_PER_TENSOR


# ---------------------------------------------------------------------- copying


def test_a_deep_copy_is_independent_and_trains(step: fc.TrainingStep) -> None:
    model, reference = copy.deepcopy(step.model), copy.deepcopy(step.model)
    before = copy.deepcopy(step.model.state_dict())
    torch_loop(model, batches(3))
    trained(reference, 3)
    assert all(torch.equal(t, before[n]) for n, t in step.model.state_dict().items())
    assert_same_weights(model, reference)
    step(*batches(1)[0])
    assert_same_weights(model, reference)  # nor does the original's step move its copies


def test_a_pickled_model_is_as_large_as_the_model_and_trains(step: fc.TrainingStep) -> None:
    tensors = step.model.state_dict()
    written = pickle.dumps(step.model)
    assert len(written) <= size_of(tensors) + PICKLE_PER_TENSOR * len(tensors)
    model = pickle.loads(written)
    assert_same_weights(model, step.model, rtol=0, atol=0)
    torch_loop(model, batches(1))
    step(*batches(1)[0])
    assert not torch.equal(model[0].weight, step.model.get_parameter("0.weight"))


def test_a_whole_model_can_be_saved_by_torch(step: fc.TrainingStep, tmp_path: Path) -> None:
    torch.save(step.model, tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_weights(model, step.model, rtol=0, atol=0)


# ---------------------------------------------------------------------- reading while training


def test_an_averaged_model_follows_the_training() -> None:
    model, reference = mlp(), mlp()
    decay = get_ema_multi_avg_fn(0.8)
    ours, theirs = AveragedModel(model, multi_avg_fn=decay), AveragedModel(reference, multi_avg_fn=decay)
    step, optimizer = compiled(model), torch.optim.AdamW(reference.parameters())
    for batch in batches(6):
        step(*batch)
        ours.update_parameters(model)
        optimizer.zero_grad()
        squared_error(reference, *batch).backward()
        optimizer.step()
        theirs.update_parameters(reference)
    assert_same_weights(ours, theirs)
    assert not torch.equal(ours.module.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_an_average_by_hand_reads_data_and_can_be_swapped_in() -> None:
    """The exponential average of a hundred training scripts, its evaluation by swapping, and back."""
    model = mlp()
    step = compiled(model, mode="eager")
    average = {n: p.data.clone() for n, p in model.named_parameters()}
    held = dict(model.named_parameters())  # objects taken once, as optimizers and averages do
    seen = []
    for batch in batches(4):
        step(*batch)
        for n, p in held.items():
            average[n].mul_(0.9).add_(p.data, alpha=0.1)
        seen.append(held["0.weight"].data.clone())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))

    kept = {n: p.data.clone() for n, p in held.items()}
    for n, p in held.items():
        p.data.copy_(average[n])
    assert torch.equal(model.state_dict()["0.weight"], average["0.weight"])
    for n, p in held.items():
        p.data.copy_(kept[n])
    step(*batches(1)[0])


def test_evaluation_beside_training_sees_the_weights_of_now() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    step = compiled(model)
    (x, _), *_ = data = batches(4)
    outputs = []
    for batch in data:
        step(*batch)
        model.eval()
        with torch.inference_mode():
            outputs.append(model(x))
            by_hand = model[3](model[1](model[0](x)))
        assert torch.equal(outputs[-1], by_hand)
        model.train()
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))
    assert len(step.programs) == 1


def test_a_backward_of_the_users_own_beside_training_changes_nothing() -> None:
    """As for a gradient penalty logged now and then: gradients land in .grad and the step ignores them."""
    model, reference = mlp(), mlp()
    step = compiled(model, mode="eager")
    for x, y in batches(4):
        squared_error(model, x, y).backward()
        step(x, y)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    torch_loop(reference, batches(4))
    assert_same_weights(model, reference)


def test_forward_hooks_fire_outside_the_step_as_before() -> None:
    model = mlp()
    shapes: list[torch.Size] = []
    model[1].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    step = compiled(model, mode="eager")
    step(*batches(1)[0])
    shapes.clear()
    model(torch.zeros(5, 4))
    assert shapes == [torch.Size([5, 8])]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_data_loader_with_a_forked_worker_feeds_the_step() -> None:
    model, reference = mlp(), mlp()
    x, y = (torch.cat(parts) for parts in zip(*batches(3), strict=True))
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=1, multiprocessing_context=fork)
    step = compiled(model, mode="eager")
    for _ in range(2):
        for batch in loader:
            step(*batch)
    assert int(step.metrics["step"]) == 6
    torch_loop(reference, batches(3) * 2)
    assert_same_weights(model, reference)


# ---------------------------------------------------------------------- writing while training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["load_state_dict", ".data.copy_", "copy_"])
def test_weights_written_into_the_module_are_those_that_train_on(how: str, dtype: torch.dtype) -> None:
    """Whoever writes: a version counter would miss ``.data.copy_``. With bf16 the fp32 master follows."""
    model = mlp(dtype)
    step = compiled(model, optimizer=fc.optim.adamw(lr=1e-4, weight_decay=0.0), mode="eager")
    for batch in batches(3, dtype=dtype):
        step(*batch)
    new = {n: p.detach() + 1 for n, p in model.named_parameters()}
    if how == "load_state_dict":
        model.load_state_dict(new)
    for name, p in model.named_parameters():
        if how == ".data.copy_":
            p.data.copy_(new[name])
        elif how == "copy_":
            with torch.no_grad():
                p.copy_(new[name])
    step(*batches(1, dtype=dtype)[0])
    masters = step.state_dict()["optimizer"]
    for name, p in model.named_parameters():
        weight = masters[f"master.{name}"] if dtype == torch.bfloat16 else p.detach()
        # One step moves an entry by about lr = 1e-4; the write had moved it by 1.
        torch.testing.assert_close(weight, new[name].float(), rtol=0, atol=1e-3, msg=naming(name))
        assert not torch.equal(weight, new[name].float())


def test_parts_written_into_a_bf16_module_leave_the_masters_of_the_rest() -> None:
    model, untouched = mlp(torch.bfloat16), mlp(torch.bfloat16)
    step, other = compiled(model, mode="eager"), compiled(untouched, mode="eager")
    for batch in batches(3, dtype=torch.bfloat16):
        step(*batch)
        other(*batch)
    before = step.state_dict()["optimizer"]
    with torch.no_grad():
        model.get_parameter("0.bias")[3] = 2.0
    step.hyperparameters["lr"] = 0.0
    step(*batches(1, dtype=torch.bfloat16)[0])
    after = step.state_dict()["optimizer"]
    changed = {n: (after[n] != before[n]).nonzero().flatten().tolist() for n in after if n.startswith("master.")}
    assert {n: where for n, where in changed.items() if where} == {"master.0.bias": [3]}
    assert float(after["master.0.bias"][3]) == 2.0


def test_parameters_keep_their_identity_and_address_from_the_first_step_on() -> None:
    model = mlp()
    objects = [id(p) for p in model.parameters()]
    step = compiled(model, mode="eager")
    addresses = [p.data_ptr() for p in model.parameters()]
    for batch in batches(3):
        step(*batch)
    model.load_state_dict(mlp().state_dict())
    step.load_state_dict(step.state_dict())
    step(*batches(1)[0])
    assert [id(p) for p in model.parameters()] == objects
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_the_weights_outlive_the_step() -> None:
    """The banks' memory belongs to whoever still holds a parameter."""
    model = wide()
    step = trained(model)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    del step
    scratch = [torch.full((4096,), 7.0) for _ in range(50)]  # would land in freed memory
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters()) and len(scratch) == 50


def test_a_second_step_may_be_compiled_and_takes_over() -> None:
    """As after a change of loss; the first one then refuses, as its banks are no longer the model's."""
    model = mlp()
    first = trained(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    second = compiled(model, mode="eager")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    second(*batches(1)[0])
    with pytest.raises(RuntimeError, match=r"0.weight .* was rebound"):
        first(*batches(1)[0])
