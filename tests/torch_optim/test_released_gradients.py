"""Updates inside backward(): the ordinary torch optimizer's numbers bit for bit, and gradients that are gone."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._torch_optim.released_gradients import ReleasedGradients
from fusion_compile.optim._registry import names
from fusion_compile.torch_optimizer import TorchOptimizer

POOLED = {"prodigy", "autokaon", "fusionopt_compat"}
"""Recipes that refuse; `test_pooled.py` has the reasons."""


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices on the spectral path, three of one shape, a convolution, vectors and a parameter of one entry."""
    torch.manual_seed(0)
    scale = nn.Linear(1, 1, bias=False)
    return nn.Sequential(
        *(nn.Linear(12, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)),
        *(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(128, 1), scale),
    ).to(dtype)


def layers() -> nn.Sequential:
    """Six parameters of two shapes."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))


def losses(dtype: torch.dtype = torch.float32) -> Callable[[nn.Module], Tensor]:
    source = torch.Generator().manual_seed(1)
    return lambda model: model(torch.randn(2, 4, 12, generator=source).to(dtype)).float().square().mean()


def trained(
    choice: Any, *, release: bool, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, TorchOptimizer]:
    model, loss = network(dtype), losses(dtype)
    optimizer = optim.as_torch_optimizer(model, choice, **{"mode": "eager", "release_gradients": release, **options})
    for _ in range(steps):
        loss(model).backward()
        assert not release or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def kept(optimizer: TorchOptimizer) -> dict[str, Tensor]:
    """All state but what parts only measure, which is that of one parameter where gradients are released."""
    measured = ("keep_frac", "share", "gain", "norm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights are y
        state = optimizer.state_dict()["state"]
    return {
        f"{i}.{part}": t
        for i, parts in state.items()
        for part, t in parts.items()
        if not part.endswith(measured) and "audit" not in part
    }


def assert_same_state(one: TorchOptimizer, other: TorchOptimizer) -> None:
    mine, theirs = kept(one), kept(other)
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(t, theirs[k]) for k, t in mine.items()), [
        k for k, t in mine.items() if not torch.equal(t, theirs[k])
    ]
    assert [g["steps"] for g in one.param_groups] == [g["steps"] for g in other.param_groups]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in names() if n not in POOLED])
def test_every_recipe_is_the_ordinary_optimizers_bit_for_bit(name: str) -> None:
    """SOAP's bases and the codecs' noise included; the sums of each parameter are added up in the same order."""
    ordinary, released = (trained(name, release=release) for release in (False, True))
    assert_same(ordinary[0], released[0])
    if name not in ("fusion", "full_fusion"):  # whose numbers are measurements under names of their own
        assert_same_state(ordinary[1], released[1])


@pytest.mark.parametrize("form", ["master", "exact", "kahan", "stochastic"])
def test_half_precision_is_the_ordinary_optimizers(form: str) -> None:
    choice = functools.partial(optim.lion, momentum="4bit")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "half_precision": form}
    ordinary, released = (trained(choice, release=release, **options) for release in (False, True))
    assert_same(ordinary[0], released[0])
    assert_same_state(ordinary[1], released[1])


@pytest.mark.parametrize("make", [optim.adamw, optim.sf_adamw])
def test_the_codecs_are_the_ordinary_optimizers(make: Any) -> None:
    choice = functools.partial(make, momentum="int8", second_moment="int8")
    if make is optim.sf_adamw:
        choice = functools.partial(make, second_moment="int8")
    ordinary, released = (trained(choice, release=release) for release in (False, True))
    assert_same(ordinary[0], released[0])
    assert_same_state(ordinary[1], released[1])


def test_weights_move_inside_backward_and_step_only_ends_the_step() -> None:
    model, loss = network(), losses()
    optimizer = optim.Lion(model, lr=1e-2, mode="eager", release_gradients=True)
    before = [p.detach().clone() for p in model.parameters()]
    loss(model).backward()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["steps"] == 0
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    optimizer.step()  # nothing has come since
    assert optimizer.param_groups[0]["steps"] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))


def test_one_gradient_is_alive_at_a_time() -> None:
    """When the gradient of an early layer comes, those of all later layers are gone."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    optimizer = optim.AdamW(model, mode="eager", release_gradients=True)
    alive: list[int] = []
    for weight in model.parameters():
        weight.register_hook(lambda g: alive.append(sum(p.grad is not None for p in model.parameters())))
    model(torch.randn(2, 8)).square().mean().backward()
    optimizer.step()
    assert alive == [0, 0, 0, 0]


def test_one_program_for_each_shape_whatever_the_names() -> None:
    """Noise is drawn by name: the program takes the name as a tensor."""
    models = []
    for release in (False, True):
        model = layers()
        choice = functools.partial(optim.lion, momentum="bf16")
        options: dict[str, Any] = {"backend": "aot_eager", "release_gradients": release}
        optimizer = optim.as_torch_optimizer(model, choice, **options)
        for step in range(2):
            model(torch.full((2, 8), 1.0 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    released = optimizer._inside.released
    assert isinstance(released, ReleasedGradients)
    assert len(released) == 2 and len(list(model.parameters())) == 6
    assert_same(*models)


@pytest.mark.exhaustive
def test_inductors_kernels_are_those_of_the_ordinary_optimizer_but_for_rounding() -> None:
    """One kernel over a bank and one over a parameter may contract multiplications and additions differently: some
    units in the last place a step, of entries near 0.1."""
    models = []
    for release in (False, True):
        model = layers()
        optimizer = optim.as_torch_optimizer(model, "adamw", lr=1e-3, release_gradients=release)
        for step in range(3):
            model(torch.full((2, 8), 1.0 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- what steps may look like -------------------------------------------------------------------------------------


def in_groups(model: nn.Sequential, choice: Any, *, release: bool) -> TorchOptimizer:
    late = [(n, p) for n, p in model.named_parameters() if n.startswith("7")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("7")]
    groups = [{"params": rest}, {"params": late, "lr": 0.05, "maximize": True}]
    return optim.as_torch_optimizer(groups, choice, model=model, mode="eager", release_gradients=release)


@pytest.mark.filterwarnings("ignore:.* has a gradient, and had none")
@pytest.mark.parametrize("choice", ["adamw", "sf_adamw"])
def test_groups_schedules_missing_gradients_and_joining_parameters(choice: str) -> None:
    def run(release: bool) -> tuple[nn.Module, TorchOptimizer]:
        model, loss = network(), losses()
        model[5].requires_grad_(False)
        optimizer = in_groups(model, choice, release=release)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            if step == 2:
                model[5].requires_grad_(True)
            model[0].requires_grad_(step != 1)
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    (ordinary, one), (released, other) = run(False), run(True)
    assert_same(ordinary, released)
    assert_same_state(one, other)


def test_a_gradient_that_is_put_there_by_hand_is_applied_at_step() -> None:
    models = [network(), network()]
    for model, release in zip(models, (False, True), strict=True):
        optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=release)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(*models)


def test_a_group_that_is_added_later_is_released_from_its_second_step_on() -> None:
    model, extra = network(), nn.Linear(1, 1)
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=True)
    optimizer.add_param_group({"params": [(f"extra.{n}", p) for n, p in extra.named_parameters()]})
    loss = losses()
    for kept_at_first in (True, False):
        start = extra.weight.detach().clone()
        extra(torch.ones(1, 1)).mul(loss(model)).sum().backward()
        assert (extra.weight.grad is not None) is kept_at_first
        optimizer.step()
        assert extra.weight.grad is None and not torch.equal(start, extra.weight)


def test_schedule_free_shows_its_average_between_steps() -> None:
    ordinary, released = (trained("sf_adamw", release=release) for release in (False, True))
    for model, optimizer in (ordinary, released):
        optimizer.eval()
        assert not optimizer.training and len(list(model.parameters())) > 0
    assert_same(ordinary[0], released[0])
    with pytest.raises(RuntimeError, match=r"a gradient came while the optimizer is in eval mode.*optimizer\.train"):
        losses()(released[0]).backward()


@pytest.mark.parametrize("end", ["eval", "state_dict"])
def test_a_step_that_nobody_ended_ends_with_what_reads_the_state(end: str) -> None:
    model, loss = network(), losses()
    optimizer = optim.as_torch_optimizer(model, "sf_adamw", mode="eager", release_gradients=True)
    loss(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is saved at y
        getattr(optimizer, end)()
    assert optimizer.param_groups[0]["steps"] == 1


def test_a_resumed_run_and_copies_go_on_bit_for_bit() -> None:
    model, loss = network(), losses()
    choice = functools.partial(optim.adakaon, momentum="bf16")
    optimizer = optim.as_torch_optimizer(model, choice, mode="eager", release_gradients=True)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    both = pickle.loads(pickle.dumps((model, optimizer)))
    copied = copy.deepcopy((model, optimizer))
    fresh = network()
    resumed = optim.as_torch_optimizer(fresh, choice, mode="eager", release_gradients=True)
    fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    x = torch.randn(2, 4, 12)
    for one, its in ((model, optimizer), (fresh, resumed), both, copied):
        one(x).square().mean().backward()
        assert all(p.grad is None for p in one.parameters())
        its.step()
        assert_same(one, model)


def test_a_dropped_optimizer_takes_its_hooks_along() -> None:
    model, loss = network(), losses()
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=True)
    del optimizer
    gc.collect()
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_weight_in_two_places_is_updated_once_when_its_gradient_is_complete() -> None:
    def run(release: bool, recompute: bool) -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        optimizer = optim.as_torch_optimizer(shared, "adamw", mode="eager", release_gradients=release)
        for _ in range(3):
            x = torch.ones(2, 8)
            for _ in range(2):
                x = checkpoint(shared, x, use_reentrant=False) if recompute else shared(x)
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return shared

    assert_same(run(False, False), run(True, False))
    assert_same(run(False, True), run(True, True))


def test_a_compiled_model_releases_its_gradients() -> None:
    models = []
    for release in (False, True):
        model = network()
        compiled: Any = torch.compile(model, backend="aot_eager")
        optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=release)
        for _ in range(2):
            compiled(torch.ones(2, 4, 12)).square().mean().backward()
            assert not release or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same(*models)


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_refused() -> None:
    model, loss = network(), losses()
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=True)
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"a second gradient of 8\.weight \[1, 1\] came before optimizer\.step"):
        loss(model).backward()
    assert optimizer.param_groups[0]["steps"] == 0


def test_a_scaled_loss_is_refused_before_anything_is_changed() -> None:
    model, loss = network(), losses()
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=True)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="with a GradScaler: the gradients that arrive are scaled"):
        scaler.scale(loss(model)).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["steps"] == 0 and not optimizer.state


def test_a_scaler_that_comes_later_is_refused_at_its_step() -> None:
    model, optimizer = trained("adamw", release=True, steps=1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(losses()(model)).backward()
    with pytest.raises(RuntimeError, match="with a GradScaler"):
        scaler.step(optimizer)


def test_a_gradient_that_fits_no_bank_is_refused() -> None:
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = optim.as_torch_optimizer(table, "adamw", mode="eager", release_gradients=True)
    with pytest.raises(RuntimeError, match=r"the gradient of weight .* is sparse"):
        table(torch.tensor([1])).sum().backward()
    assert optimizer.param_groups[0]["steps"] == 0


def test_parameters_of_two_precisions_in_one_group_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    optimizer = optim.as_torch_optimizer(model, "adamw", mode="eager", release_gradients=True)
    with pytest.raises(ValueError, match=r"0\.bias is torch\.float32 .* a group of their own"):
        model[1](model[0](torch.ones(1, 4)).double()).sum().backward()
    assert optimizer.param_groups[0]["steps"] == 0


def test_an_average_of_the_weights_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"release_gradients=True with ema=: an average follows every weight"):
        optim.as_torch_optimizer(model, "adamw", ema=fc.EMA(model), release_gradients=True)


def test_the_classes_of_other_packages_release_too() -> None:
    from fusion_compile.optim.kaon import Adakaon
    from fusion_compile.optim.kempner import Lion

    for made in (Adakaon, Lion, fc.optim.AdaMuon):
        model = nn.Linear(4, 4)
        optimizer = made(model.parameters(), lr=1e-3, mode="eager", release_gradients=True)
        start = model.weight.detach().clone()
        model(torch.randn(1, 4)).square().sum().backward()
        assert model.weight.grad is None and not torch.equal(start, model.weight)
        optimizer.step()
