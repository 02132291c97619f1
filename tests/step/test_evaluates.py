"""What is asked of an evaluation, and the means over a loader."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusion_compile as fc
from tests.small_models import batches, compiled, mlp


def step_of(loss_fn: object, **options: object) -> fc.TrainingStep:
    return compiled(mlp(), loss_fn, mode="eager", **options)  # type: ignore[arg-type]


def masked(model: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    errors = model(x).square().mean(1) * mask
    return errors.sum() / mask.sum(), {"tokens": mask.sum(), "by column": model(x).mean(0)}


def test_a_loader_gives_the_means_over_all_entries() -> None:
    step = step_of(lambda m, x: (m(x).square().mean(), {"columns": m(x).mean(0)}))
    x = torch.randn(20, 4)
    means = step.evaluate_all(DataLoader(TensorDataset(x), batch_size=8))
    whole = step.evaluate(x)
    for name, value in whole.items():
        torch.testing.assert_close(means[name], value.double(), rtol=1e-6, atol=1e-7)  # fp32 sums in another order
    assert (int(means["batches"]), int(means["entries"])) == (3, 20)


def test_arrays_of_numpy_count_by_their_leading_size() -> None:
    step = compiled(mlp(), lambda m, x, y: F.mse_loss(m(torch.from_numpy(x)), torch.from_numpy(y)), mode="eager")
    data = [(x[:n], y[:n]) for n, (x, y) in zip((8, 3), batches(2), strict=True)]
    means = step.evaluate_all([(x.numpy(), y.numpy()) for x, y in data], progress=False)
    wanted = compiled(mlp(), mode="eager").evaluate_all(data, progress=False)
    assert int(means["entries"]) == 11
    torch.testing.assert_close(means, wanted, rtol=0, atol=0)


def test_a_count_weighs_the_batches() -> None:
    step = step_of(masked, weigh_by="tokens")
    x, mask = torch.randn(20, 4), (torch.rand(20) > 0.6).float()
    means = step.evaluate_all([[x[:8], mask[:8]], (x[8:], mask[8:])])
    assert means["tokens"] == mask.sum()
    # fp32 sums in another order
    torch.testing.assert_close(means["loss"], step.evaluate(x, mask)["loss"].double(), rtol=1e-6, atol=1e-7)


def test_a_generator_draws_and_a_seed_repeats() -> None:
    def noisy(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x + torch.randn_like(x)).square().mean()
        return found

    step, x = step_of(noisy), torch.randn(8, 4)
    assert step.evaluate(x)["loss"] == step.evaluate(x)["loss"] != step.evaluate(x, seed=1)["loss"]
    source = torch.Generator().manual_seed(3)
    first, second = (step.evaluate(x, generator=source)["loss"] for _ in range(2))
    assert first != second
    loader = [x, x]
    assert step.evaluate_all(loader)["loss"] == step.evaluate_all(loader)["loss"]
    assert step.evaluate_all(loader, seed=1)["loss"] != step.evaluate_all(loader)["loss"]


def test_what_cannot_be_evaluated_is_said() -> None:
    step = step_of(lambda m, x: m(x).square().mean())
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"weights='best'\) is not known"):
        step.evaluate(x, weights="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not keep this average"):
        step.evaluate(x, weights=fc.EMA(name="slow"))
    with pytest.raises(ValueError, match="without batches"):
        step.evaluate_all([])
    with pytest.raises(ValueError, match="names no metric that the loss returned"):
        step_of(lambda m, x: m(x).square().mean(), weigh_by="n").evaluate_all([x])
    with pytest.raises(ValueError, match=r"\[8, 2\] in one batch and \[4, 2\] in another"):
        step_of(lambda m, x: (m(x).square().mean(), {"all": m(x)})).evaluate_all([x, x[:4]])
    with pytest.raises(ValueError, match=r"loss of shape \[8, 2\] in evaluation mode"):
        step_of(lambda m, x: m(x)).evaluate(x)
    step.release()
    with pytest.raises(RuntimeError, match="was released"):
        step.evaluate(x)
