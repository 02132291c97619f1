"""`as_torch_optimizer`: the same numbers as a training step, in loops written for torch.optim."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from fusion_compile import compile_training_step, optim
from fusion_compile.optim import Transform, as_torch_optimizer
from fusion_compile.optim._transform import EmptyState, Extras, Periodic
from fusion_compile.optim._tree import number_like
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import SHAPES, Bowl, loss_fn, noise
from tests.small_models import batches, mlp

SCHEDULE_FREE = tuple(n for n, recipe in optim.RECIPES.items() if recipe().gradient_point is not None)


def made(params: Any, transform: Any = "adamw", **options: Any) -> TorchOptimizer:
    return as_torch_optimizer(transform, params, **{"mode": "eager", **options})


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, each: Callable[[], Any] = lambda: None
) -> None:
    """The ordinary loop; `each` runs after each step."""
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        each()


def bowl_steps(model: nn.Module, optimizer: TorchOptimizer, steps: range) -> None:
    """The steps of the Bowl with these numbers, with their losses for recipes that ask for them."""
    for i in steps:
        optimizer.zero_grad()
        loss = loss_fn(model, *noise(i))
        loss.backward()
        optimizer.set_loss(loss)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def close_to_torch(model: nn.Module, reference: nn.Module) -> None:
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # a few roundings of fp32 (6e-8) on weights below 1, through a division by √v
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# -- the same optimizer as in a training step --------------------------------------------------------------------------


def side_by_side(name: str, **options: Any) -> None:
    """30 steps of the training step, and of the facade on gradients at the same points: all state, bit for bit."""
    transform = optim.RECIPES[name]()
    step = compile_training_step(Bowl(), loss_fn, optimizer=transform, **options)
    model = Bowl()
    optimizer = as_torch_optimizer(transform, model, **options)
    for i in range(30):
        bowl_steps(model, optimizer, range(i, i + 1))
        step(*noise(i))
        ours = optimizer._inside.hosts[0].group
        assert ours is not None
        theirs = {k: t for k, t in step._state.items() if k.startswith(("params/", "optimizer/"))}
        assert theirs.keys() == {k[2:] for k in ours.state if k.startswith(("0/params/", "0/optimizer/"))}
        differing = [k for k, t in theirs.items() if not torch.equal(t, ours.state[f"0/{k}"])]
        assert not differing, (i, differing)
        assert equal(weights(model), step.gradient_point()), i
    optimizer.eval()
    assert equal(weights(model), weights(step.model))
    assert not equal(weights(model), weights(Bowl()))


@pytest.mark.parametrize("name", optim.RECIPES)
def test_thirty_steps_are_bitwise_those_of_the_training_step(name: str) -> None:
    side_by_side(name, mode="eager")


@pytest.mark.parametrize("name", ["adamw", "sf_normuon"])
def test_thirty_captured_steps_are_bitwise_those_of_the_training_step(name: str) -> None:
    side_by_side(name, backend="aot_eager")


def test_compiled_by_inductor_it_is_torchs_adamw() -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(optim.adamw(lr=1e-2), model)
    train(model, optimizer, batches(10))
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2), batches(10))
    assert len(optimizer._inside.programs) == 1
    close_to_torch(model, reference)


def test_half_precision_parameters_have_a_master_and_what_is_written_into_them_counts() -> None:
    """Steps of 1e-4 from 1 are lost in bf16, whose next number below is 0.996, and not in the master."""
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = made([p], optim.adamw(lr=1e-4, weight_decay=0.0))
    for _ in range(60):
        p.grad = torch.ones_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"]
    assert master.dtype == torch.float32 and torch.equal(p, master.bfloat16())
    torch.testing.assert_close(master, torch.full((5,), 1 - 60e-4), rtol=0, atol=4e-6)  # 60 roundings of 6e-8
    with torch.no_grad():
        p.fill_(2.0)
    optimizer.step()
    torch.testing.assert_close(master, torch.full((5,), 2 - 1e-4), rtol=0, atol=1e-6)


# -- parameter groups --------------------------------------------------------------------------------------------------


def two_groups(model: nn.Module, named: bool = True) -> list[dict[str, Any]]:
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    strip = list if named else lambda pairs: [p for _, p in pairs]
    return [{"params": strip(decayed)}, {"params": strip(rest), "lr": 3e-3, "weight_decay": 0.0}]


@pytest.mark.parametrize("named", [True, False])
def test_groups_override_numbers_in_one_program(named: bool) -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(optim.adamw(lr=1e-2), two_groups(model, named), backend="aot_eager")
    train(model, optimizer, batches(8))
    train(reference, torch.optim.AdamW(two_groups(reference, False), lr=1e-2), batches(8))
    close_to_torch(model, reference)
    assert len(optimizer._inside.programs) == 1
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 3e-3]
    assert [g["steps"] for g in optimizer.param_groups] == [8, 8]


def test_a_group_may_join_later() -> None:
    model, reference = mlp(), mlp()
    optimizer = made(two_groups(model)[:1], optim.adamw(lr=1e-2))
    other = torch.optim.AdamW(two_groups(reference, False)[:1], lr=1e-2)
    for m, o, named in ((model, optimizer, True), (reference, other, False)):
        train(m, o, batches(3))
        o.add_param_group(two_groups(m, named)[1])
        train(m, o, batches(6)[3:])
    close_to_torch(model, reference)


def test_names_route_as_modules_do_where_they_can() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embed = nn.Embedding(200, 128)
            self.body = nn.Linear(128, 256, bias=False)
            self.inner = nn.Linear(256, 128)
            self.lm_head = nn.Linear(128, 200)

        def forward(self, i: Tensor) -> Tensor:
            out: Tensor = self.lm_head(self.inner(self.body(self.tok_embed(i))))
            return out

    roles = []
    for by_name in (False, True):
        model = Net()
        optimizer = made(model.named_parameters() if by_name else model, "muon")
        model(torch.arange(4)).sum().backward()
        optimizer.step()
        roles.append({r.name: r.role for r in optimizer.routes})
    assert roles[0] == roles[1]
    assert {n for n, role in roles[0].items() if role == "spectral"} == {"body.weight", "inner.weight"}
    model = Net()
    optimizer = made(model.named_parameters(), "muon", force_scalar=["^body"], force_spectral=["tok_embed"])
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    assert {r.name for r in optimizer.routes if r.role == "spectral"} == {"tok_embed.weight", "inner.weight"}


# -- loops of other people ---------------------------------------------------------------------------------------------


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=False)


@pytest.mark.parametrize("schedule", [lambda o: LambdaLR(o, lambda i: 1 / (1 + i)), one_cycle])
def test_torchs_schedulers_and_no_recompile(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(optim.adamw(lr=1e-2), model.named_parameters(), backend="aot_eager")
    scheduler = schedule(optimizer)
    train(model, optimizer, batches(1), scheduler.step)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, batches(12)[1:], scheduler.step)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    train(reference, other, batches(12), schedule(other).step)
    close_to_torch(model, reference)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] != 1e-2


def test_reduce_on_plateau_lowers_the_rate_that_the_program_reads() -> None:
    model = mlp()
    optimizer = made(model.named_parameters(), optim.adamw(lr=1e-2))
    scheduler = ReduceLROnPlateau(optimizer, factor=0.0, patience=0)
    train(model, optimizer, batches(2), lambda: scheduler.step(1.0))
    before = weights(model)
    train(model, optimizer, batches(2))
    assert optimizer.param_groups[0]["lr"] == 0.0 and equal(weights(model), before)


def test_a_schedule_of_ours_runs_until_somebody_writes_the_number() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = made([p], optim.adamw(lr=optim.linear(1e-2, total_steps=10)))
    seen = []
    for i in range(6):
        p.grad = torch.ones_like(p)
        if i == 3:
            optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
    schedule = optim.linear(1e-2, total_steps=10)
    assert seen == [*map(schedule, range(3)), 0.5, 0.5, 0.5] and len(set(seen)) == 4


def test_a_schedule_of_ours_goes_on_after_a_resume() -> None:
    schedule = optim.linear(1e-2, total_steps=10)
    p = nn.Parameter(torch.zeros(3))
    first, second = (made([p], "adamw", lr=schedule) for _ in range(2))
    p.grad = torch.ones_like(p)
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    for i in range(4, 7):
        second.step()
        assert second.param_groups[0]["lr"] == schedule(i)


def test_a_scheduler_that_reaches_one_of_two_rates_is_said_once() -> None:
    def run(transform: Transform) -> None:
        model = Bowl()
        optimizer = made(model, transform)
        scheduler = LambdaLR(optimizer, lambda i: 1 / (1 + i))
        for i in range(3):
            loss_fn(model, *noise(i)).backward()
            optimizer.step()
            scheduler.step()

    with pytest.warns(UserWarning, match=r"scalar_lr stayed.*muon\(scalar_lr=optim.cosine") as said:
        run(optim.muon())
    assert len(said) == 1
    run(optim.muon(scalar_lr=optim.linear(1e-3, 10)))  # a warning is an error here


@pytest.mark.parametrize("overflow_at", [None, 2])
def test_grad_scaler(overflow_at: int | None) -> None:
    """The scaler unscales, and skips the step whose gradient is infinite."""
    found = []
    for ours in (True, False):
        model = mlp()
        optimizer = made(model, optim.adamw(lr=1e-2)) if ours else torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, batch in enumerate(batches(5)):
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss_of(model, batch)).backward()
            if i == overflow_at:
                next(model.parameters()).grad.fill_(torch.inf)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        found.append(model)
        if ours:
            assert optimizer.param_groups[0]["steps"] == (5 if overflow_at is None else 4)
    close_to_torch(*found)


class AccelerateLike:
    """What accelerate does to an optimizer: its state makes a trip when it is wrapped, ``train()`` before every step,
    and inside the scaler's step a patched ``step`` that tells whether it was skipped."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.scaler, self.called = optimizer, torch.amp.GradScaler("cpu"), 0
        self.original = optimizer.step
        optimizer.load_state_dict(optimizer.state_dict())

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        self.called += 1
        return self.original(*args, **kwargs)

    def step(self) -> None:
        self.optimizer.train()
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.step = self.original


@pytest.mark.parametrize("name", ["adamw", *SCHEDULE_FREE])
def test_an_accelerate_like_wrapper(name: str) -> None:
    models = [Bowl(), Bowl()]
    plain, wrapped = (made(m, name) for m in models)
    outer = AccelerateLike(wrapped)
    for i in range(5):
        for model, scale in zip(models, (lambda x: x, outer.scaler.scale), strict=True):
            model.zero_grad()
            scale(loss_fn(model, *noise(i))).backward()
        plain.set_loss(1.0)
        wrapped.set_loss(1.0)
        plain.step()
        outer.step()
    assert outer.called == 5
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)  # the scale is a power of two: exact


def test_a_lightning_like_wrapper() -> None:
    """It copies ``__dict__``, so that what changes must not lie there."""
    model = Bowl()
    optimizer = made(model, "sf_adamw")
    wrapper = object.__new__(type("LightningLike", (TorchOptimizer,), {}))
    wrapper.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    for i in range(3):
        loss_fn(model, *noise(i)).backward()
        optimizer.step(closure=None)
        optimizer.zero_grad()
    y = weights(model)
    wrapper.eval()
    assert not equal(weights(model), y)
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()
    assert wrapper.state_dict()["param_groups"][0]["steps"] == 3
    wrapper.train()
    assert equal(weights(model), y)


def test_a_model_may_move_until_the_first_step_and_after_it_is_refused_with_a_way_out() -> None:
    model = mlp()
    optimizer = made(model.named_parameters(), optim.adamw(lr=1e-2))
    for p in model.parameters():
        p.data = p.data.clone()  # as model.to(device) does
    train(model, optimizer, batches(2))
    start = weights(model)
    model[0].weight.data = model[0].weight.data.clone()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight \[8, 4\] was rebound.*load_state_dict\(optimizer\.state_dict"):
        optimizer.step()
    assert equal(weights(model), start)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(4)[2:])
    other = mlp()
    train(other, made(other.named_parameters(), optim.adamw(lr=1e-2)), batches(4))
    assert equal(weights(model), weights(other))


def test_averaged_model_and_versions() -> None:
    model = mlp()
    optimizer = made(model)
    average = AveragedModel(model)
    versions = {n: p._version for n, p in model.named_parameters()}
    train(model, optimizer, batches(3), lambda: average.update_parameters(model))
    assert all(p._version > versions[n] for n, p in model.named_parameters())
    assert not equal(weights(average.module), weights(model)) and int(average.n_averaged) == 3


def test_hooks_run_around_each_step() -> None:
    model, said = mlp(), []
    optimizer = made(model)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: said.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: said.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: said.append(saved["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: said.append("loaded"))
    train(model, optimizer, batches(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert said == ["before", "after", "before", "after", 1, "loaded"]


def test_a_step_inside_autocast_is_the_same_step() -> None:
    models = [Bowl(), Bowl()]
    for model, enabled in zip(models, (False, True), strict=True):
        optimizer = made(model, optim.muon(matmul_dtype=torch.float32), mode=None, backend="aot_eager")
        for i in range(3):
            optimizer.zero_grad()
            loss_fn(model, *noise(i)).backward()
            with torch.autocast("cpu", enabled=enabled and i > 0):
                optimizer.step()
        assert len(optimizer._inside.programs) == 1
    assert equal(weights(models[0]), weights(models[1]))


# -- parameters without gradients --------------------------------------------------------------------------------------


def only_some(model: nn.Module, step: int) -> None:
    """Every second step the last layer has no gradient, every third no bias has one."""
    for n, p in model.named_parameters():
        if (step % 2 and n.startswith("2.")) or (step % 3 == 2 and n.endswith("bias")):
            p.grad = None


@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
def test_a_parameter_without_a_gradient_is_left_alone(options: dict[str, Any]) -> None:
    """Against torch.optim, without Adam's bias correction, whose count is the group's here: with SGD with momentum."""
    transform = optim.chain(optim.scale_by_adam((0.0, 0.0), eps=1.0), optim.scale_by_learning_rate(1e-2))
    model, reference = mlp(), mlp()
    optimizer = as_torch_optimizer(transform, model, **options)
    other = torch.optim.Adam(reference.parameters(), lr=1e-2, betas=(0.0, 0.0), eps=1.0)
    for i, batch in enumerate(batches(9)):
        for m, o in ((model, optimizer), (reference, other)):
            o.zero_grad()
            loss_of(m, batch).backward()
            only_some(m, i)
            o.step()
    close_to_torch(model, reference)
    assert len(optimizer._inside.programs) == 2, "one program for all steps that miss a gradient, whichever"


@pytest.mark.parametrize("name", optim.RECIPES)
def test_of_a_parameter_without_a_gradient_no_bit_of_weight_or_state_changes(name: str) -> None:
    """A whole matrix of a stacked bank, a part of a flat one; what the others share runs on."""
    model = nn.ModuleDict({n: nn.Linear(128, 128) for n in "abc"})
    optimizer = made(model, name)
    for i in range(4):
        for n, p in model.named_parameters():
            p.grad = None if i > 1 and n.startswith("b") else torch.randn_like(p)
        if i == 2:
            before = {n: {k: t.clone() for k, t in optimizer.state[p].items()} for n, p in model.named_parameters()}
            start = weights(model)
        optimizer.set_loss(1.0)
        optimizer.step()
    for n, p in model.named_parameters():
        parts = {k for k, t in optimizer.state[p].items() if t.ndim and not torch.equal(t, before[n][k])}
        assert torch.equal(p, start[n]) is (n.startswith("b"))
        assert bool(parts) is not n.startswith("b"), (n, parts)


def test_nothing_happens_without_any_gradient_and_an_idle_group_stands_still() -> None:
    model = mlp()
    optimizer = made(two_groups(model))
    before = weights(model)
    optimizer.step()
    assert equal(weights(model), before) and not optimizer.state_dict()["state"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [g["steps"] for g in optimizer.param_groups] == [1, 0]
    after = weights(model)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {"0.weight", "2.weight"}


@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
def test_a_frozen_parameter_takes_no_memory_and_joins_when_it_has_a_gradient(name: str) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = made(model, name)
    train(model, optimizer, batches(3))
    assert {n for n, p in model.named_parameters() if optimizer.state.get(p)} == {"2.weight", "2.bias"}
    first = weights(model)
    kept = {k: t.clone() for k, t in optimizer.state[model[2].weight].items()}
    model[0].requires_grad_(True)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, batches(1))
    assert len(optimizer.state) == 4
    if name == "sf_adamw":  # at lr = 0 z stands still
        assert torch.equal(optimizer.state[model[2].weight]["z"], kept["z"])
    assert float(kept[next(k for k in kept if "beta2_power" in k)]) > float(
        optimizer.state[model[2].weight][next(k for k in kept if "beta2_power" in k)]
    ), "the group's count went on"
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, batches(2))
    assert not any(torch.equal(p, first[n]) for n, p in model.named_parameters())


def test_a_frozen_parameter_comes_back_with_the_moments_it_was_saved_with() -> None:
    """And the others' count, not the one of the checkpoint, goes on."""
    model, optimizer = trained_bowl("adamw")
    saved = copy.deepcopy(optimizer.state_dict())
    model.tall.requires_grad_(False)
    fresh = made(model, "adamw")
    fresh.load_state_dict(saved)
    moments = fresh.state[model.tall]["0.nu"].clone()
    for thaw in (False, False, True):
        model.tall.requires_grad_(thaw)
        model.zero_grad()
        loss_fn(model, *noise(0)).backward()
        fresh.step()
    expected = 0.999 * moments + 0.001 * model.tall.grad.square()
    torch.testing.assert_close(fresh.state[model.tall]["0.nu"], expected)
    assert float(fresh.state[model.tall]["0.beta1_power"]) == pytest.approx(0.9**7)


def test_a_write_into_half_precision_weights_counts_without_a_gradient_too() -> None:
    p, q = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = made([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    with torch.no_grad():
        p.fill_(3.0)
    p.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], torch.full((4,), 3.0)) and bool((p == 3).all())


def test_a_matrix_joins_a_group_that_had_none() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 2))
    model[0].requires_grad_(False)
    optimizer = made(model, "sf_normuon")
    x = torch.randn(4, 128)
    for thaw in (False, True):
        model[0].requires_grad_(thaw)
        before = weights(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(model[0].weight, before["0.weight"]) is not thaw
    assert {r.role for r in optimizer.routes} == {"spectral", "scalar"}


# -- the loss, periodic work -------------------------------------------------------------------------------------------


def loss_sized() -> Transform:
    """Minus the loss times the gradient; it cannot do without the loss."""

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        if context.loss is None:
            raise ValueError("no loss")
        return {k: -context.loss * u for k, u in updates.items()}, state

    return Transform(lambda params: EmptyState(), update, Extras("loss_sized", {"lr": 1.0}, descends=True))


@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
def test_a_transform_that_needs_the_loss(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = as_torch_optimizer(loss_sized(), [p], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.1 * p.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(0.3)
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.3 * 0.1))
    optimizer.set_loss(2.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.3 * 0.1 - 2 * 0.1))
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"loss_sized cannot take a step without the loss.*set_loss"):
        optimizer.step()  # the loss of the step before does not count for this one
    assert torch.equal(p, before) and optimizer.param_groups[0]["steps"] == 2


def test_schedule_free_plus_takes_the_loss() -> None:
    plus = pytest.importorskip("fusion_compile.optim.schedule_free_plus").schedule_free_plus
    model = Bowl()
    optimizer = made(model, plus(optim.chain(optim.scale_by_rms(0.999, 1e-8), optim.scale_by_learning_rate(1.0))))
    loss_fn(model, *noise(0)).backward()
    with pytest.raises(RuntimeError, match="cannot take a step without the loss"):
        optimizer.step()
    before = weights(model)
    optimizer.set_loss(loss_fn(model, *noise(0)))
    optimizer.step()
    assert not equal(weights(model), before)


def counting(first: bool, said: list[str]) -> Transform:
    """Moves by -1 where a step is due and by -0.25 else; its periodic work counts in the state, its first sets 100."""

    def init(params: Any) -> Any:
        return (number_like(params, 0.0),)

    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return {k: torch.full_like(p, -1.0 if context.due else -0.25) for k, p in params.items()}, state

    def begin(state: Any, params: Any, context: Any) -> Any:
        said.append("first")
        return (state[0] + 100,)

    work = Periodic("count", 2, lambda state, params, context: (state[0] + 1,), begin if first else None)
    return Transform(init, update, Extras("counting", {"lr": 1.0}, periodic=(work,), period=3, descends=True))


@pytest.mark.parametrize("options", [{"mode": "eager"}, {"backend": "aot_eager"}])
@pytest.mark.parametrize("first", [True, False])
def test_due_steps_and_periodic_work(first: bool, options: dict[str, Any]) -> None:
    said: list[str] = []
    p = nn.Parameter(torch.zeros(3))
    optimizer = as_torch_optimizer(counting(first, said), [p], **options)
    for _ in range(7):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.tolist() == [-(3 * 1 + 4 * 0.25)] * 3  # due: steps 0, 3, 6
    assert float(optimizer.state[p]["0"]) == (100 if first else 1) + 3  # after steps 1, 3, 5, 7
    assert said == ["first"] * first
    assert len(optimizer._inside.programs) == 3


# -- Schedule-Free's two points ----------------------------------------------------------------------------------------


def trained_bowl(name: str, steps: int = 4, **options: Any) -> tuple[nn.Module, TorchOptimizer]:
    model = Bowl()
    optimizer = made(model, name, **options)
    bowl_steps(model, optimizer, range(steps))
    return model, optimizer


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_train_and_eval_swap_y_and_x(name: str) -> None:
    model, optimizer = trained_bowl(name)
    y = weights(model)
    optimizer.train()  # already
    assert equal(weights(model), y)
    optimizer.eval()
    x = {n: optimizer.state[p]["x"] for n, p in model.named_parameters()}
    assert equal(weights(model), x) and not any(torch.equal(x[n], y[n]) for n in SHAPES)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"eval mode.*optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    assert equal(weights(model), y)
    never_swapped, _ = trained_bowl(name, 6)
    bowl_steps(model, optimizer, range(4, 6))
    assert equal(weights(model), weights(never_swapped))


def test_what_is_written_in_eval_mode_is_x_and_in_train_mode_is_warned_of() -> None:
    model, optimizer = trained_bowl("sf_adamw")
    optimizer.eval()
    with torch.no_grad():
        model.bias.fill_(7.0)
    optimizer.train()
    assert torch.equal(optimizer.state[model.bias]["x"], torch.full((160,), 7.0))
    assert not torch.equal(model.bias, torch.full((160,), 7.0))  # y: z pulls at it
    with torch.no_grad():
        model.bias.fill_(7.0)
    with pytest.warns(UserWarning, match=r"bias was written to while the parameters hold Schedule-Free's y"):
        optimizer.step()


def test_saving_or_evaluating_in_train_mode_warns_once() -> None:
    model, optimizer = trained_bowl("sf_adamw", 0)
    optimizer.state_dict()  # y is x still
    loss_fn(model, *noise(0)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="are Schedule-Free's y, not the average x") as said:
        optimizer.state_dict()
        optimizer.state_dict()
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"the model is evaluated .* while the optimizer is in train mode") as said:
        model.eval()
        model(*noise(0))
        model(*noise(0))
    assert len(said) == 1
    model, optimizer = trained_bowl("sf_adamw")
    optimizer.eval()
    optimizer.state_dict()
    model.eval()(*noise(0))
    model, optimizer = trained_bowl("adamw")
    optimizer.state_dict()
    model.eval()(*noise(0))


def test_the_program_has_as_many_inputs_for_many_parameters_as_for_few() -> None:
    counts = []
    for layers in (2, 9):
        model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(layers)))
        optimizer = made(model.named_parameters(), "sf_normuon")
        model(torch.ones(1, 128)).sum().backward()
        optimizer.step()
        group = optimizer._inside.hosts[0].group
        gradients = group.gather({n: p.grad for n, p in model.named_parameters()})
        counts.append((len(gradients), len(group.state)))
    assert counts[0] == counts[1] == (2, counts[0][1])


def test_diagnostics_of_each_group() -> None:
    def told(state: Any) -> dict[str, Tensor]:
        return {"comp/count": state[0]}

    transform = counting(True, []).with_extras(diagnostics=told)
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    alone, both = made([p], transform), made([{"params": [p]}, {"params": [q]}], transform)
    for optimizer, names in ((alone, {"comp/count"}), (both, {"0/comp/count", "1/comp/count"})):
        assert optimizer.diagnostics == {}
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        assert {n: float(t) for n, t in optimizer.diagnostics.items()} == dict.fromkeys(names, 100.0)


def test_the_hook_on_the_model_is_in_nobodys_way() -> None:
    model, optimizer = trained_bowl("sf_adamw")
    model.eval()
    value = torch.compile(model, fullgraph=True, backend="eager")(*noise(0))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*noise(0)), value)  # and warns of nothing
    del optimizer
    assert torch.equal(model(*noise(0)), value)


# -- checkpoints and copies --------------------------------------------------------------------------------------------


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", optim.RECIPES)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(name: str, groups: bool) -> None:
    def begin(model: nn.Module) -> TorchOptimizer:
        named = list(model.named_parameters())
        params = [{"params": named[:2]}, {"params": named[2:], "lr": 5e-3}] if groups else named
        return made(params, name)

    def go_on(model: nn.Module, optimizer: TorchOptimizer, steps: range) -> None:
        optimizer.train()
        for i in steps:
            for rate in (n for n in optimizer.param_groups[-1] if n.endswith("lr")):
                optimizer.param_groups[-1][rate] *= 0.9
            bowl_steps(model, optimizer, range(i, i + 1))
        optimizer.eval()

    model = Bowl()
    optimizer = begin(model)
    go_on(model, optimizer, range(5))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(5, 9))

    fresh = Bowl(seed=3)
    fresh.load_state_dict(saved["model"])
    again = begin(fresh)
    again.load_state_dict(saved["optimizer"])
    assert [g["steps"] for g in again.param_groups] == [5] * len(again.param_groups)
    if name in SCHEDULE_FREE:
        assert not equal(weights(fresh), {n: saved["model"][n] for n in SHAPES}), "in train mode the model holds y"
    go_on(fresh, again, range(5, 9))
    assert equal(weights(fresh), weights(model))
    for a, b in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values(), strict=True):
        assert equal(a, b)


def test_loading_over_a_running_optimizer_recompiles_nothing() -> None:
    model = mlp()
    optimizer = as_torch_optimizer(optim.adamw(lr=1e-2), model, backend="aot_eager")
    train(model, optimizer, batches(2))
    at = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches(4)[2:])
    end = weights(model)
    model.load_state_dict(at[0])
    optimizer.load_state_dict(at[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, batches(4)[2:])
    assert equal(weights(model), end) and len(optimizer._inside.programs) == 1


def test_state_of_another_optimizer_is_refused_and_nothing_is_loaded() -> None:
    model = mlp()
    optimizer = made(model, "adamw")
    train(model, optimizer, batches(2))
    before = {i: {k: t.clone() for k, t in kept.items()} for i, kept in optimizer.state_dict()["state"].items()}
    other = mlp()
    theirs = made(other, "sf_adamw")
    train(other, theirs, batches(1))
    theirs.eval()
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  missing 0\.mu of 0\.weight"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups of \[2, 2\] parameters, this optimizer of \[4\]"):
        optimizer.load_state_dict(made(two_groups(mlp())).state_dict())
    with pytest.raises(ValueError, match="lacks param_groups"):
        optimizer.load_state_dict({"state": {}})
    changed = optimizer.state_dict()
    changed["state"][0] = {**changed["state"][0], "0.mu": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"mismatched 0\.mu of 0\.weight: \[3\] in the checkpoint, \[8, 4\] here"):
        optimizer.load_state_dict(changed)
    assert all(equal(kept, before[i]) for i, kept in optimizer.state_dict()["state"].items())


def test_a_parameter_that_the_checkpoint_lacks_begins_anew_and_only_it() -> None:
    """Also where the state to load is the optimizer's own, live."""
    model, optimizer = trained_bowl("adamw")
    kept = {k: t.clone() for k, t in optimizer.state[model.tall].items()}
    saved = optimizer.state_dict()
    del saved["state"][list(SHAPES).index("bias")]
    optimizer.load_state_dict(saved)
    assert equal(optimizer.state[model.tall], kept)
    parts = optimizer.state[model.bias]
    assert not parts["0.mu"].any() and not parts["0.nu"].any() and float(parts["0.beta1_power"]) < 1


def test_clearing_the_state_starts_anew() -> None:
    model, optimizer = trained_bowl("adamw")
    fresh = Bowl()
    fresh.load_state_dict(model.state_dict())
    other = made(fresh)
    optimizer.state.clear()
    for m, o in ((model, optimizer), (fresh, other)):
        m.zero_grad()
        loss_fn(m, *noise(9)).backward()
        o.step()
    assert equal(weights(model), weights(fresh)) and optimizer.param_groups[0]["steps"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "before the first step"])
@pytest.mark.parametrize("name", ["muon", "sf_normuon"])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name: str, how: str) -> None:
    model, optimizer = trained_bowl(name, 0 if how == "before the first step" else 4)
    pair = (model, optimizer)
    copied, again = copy.deepcopy(pair) if how != "pickle" else pickle.loads(pickle.dumps(pair))
    assert [id(p) for p in copied.parameters()] == [id(p) for p in again.param_groups[0]["params"]]
    start = weights(model)
    for m, o in ((copied, again), (model, optimizer)):
        assert equal(weights(m), start), "the other one moved"
        bowl_steps(m, o, range(4, 7))
    assert equal(weights(copied), weights(model)) and not equal(weights(model), start)


def test_a_transform_is_code_and_a_callable_that_makes_it_is_not() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"made of a Transform \(adamw\) cannot be pickled.*functools.partial"):
        pickle.dumps(made([p], optim.adamw()))
    again = pickle.loads(pickle.dumps(made([p], functools.partial(optim.adamw, lr=0.5, weight_decay=0.0))))
    q = again.param_groups[0]["params"][0]
    q.grad = torch.ones_like(q)
    again.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.5))
    assert "lr: 0.5" in repr(copy.deepcopy(made([p], optim.adamw(lr=0.5))))


# -- refusals ----------------------------------------------------------------------------------------------------------


def bare() -> Transform:
    return Transform(dict, dict, Extras("bare", descends=True))


def not_a_leaf() -> list[Any]:
    return [("w", torch.ones(2, requires_grad=True) * 2)]


def twice() -> list[Any]:
    p = nn.Parameter(torch.ones(2))
    return [("a", p), ("b", p)]


def one() -> list[Any]:
    return [("w", nn.Parameter(torch.ones(2)))]


@pytest.mark.parametrize(
    ("transform", "params", "options", "error", "words"),
    [
        ("adamw", [], {}, ValueError, "was given no parameters"),
        ("adamw", twice(), {}, ValueError, r"b \[2\] is given twice, first as a"),
        ("adamw", [{"params": twice()[:1]}, {"params": [("c", 3)]}], {}, TypeError, "c is a int"),
        ("adamw", not_a_leaf(), {}, ValueError, r"w \[2\] is the result of a computation"),
        ("adamw", [{"params": one(), "betas": (0.9, 0.9)}], {}, ValueError, "sets 'betas', which adamw does not have"),
        ("adamw", [{"params": one(), "weight_decy": 0.0}], {}, ValueError, "Did you mean 'weight_decay'"),
        ("adamw", [{"params": one(), "lr": torch.ones(())}], {}, TypeError, "'lr' was given a tensor"),
        ("muon", [nn.Parameter(torch.ones(2))], {}, ValueError, r"takes names: give the model or model\.named_param"),
        ("adam", one(), {}, ValueError, "optimizer='adam' is not a recipe"),
        (3, one(), {}, TypeError, "optimizer is a int"),
        ("adamw", one(), {"mode": "fast"}, ValueError, "mode='fast' is not known"),
        ("muon", one(), {"force_scalar": ["x"]}, ValueError, "force_scalar: 'x' matches no trainable parameter"),
        ("muon", one(), {"force_scalar": "x"}, TypeError, "is a string; give a list"),
        (bare(), one(), {"lr": 1.0}, ValueError, "bare has no hyperparameter 'lr'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    transform: Any, params: Any, options: Any, error: type[Exception], words: str
) -> None:
    def use() -> None:
        optimizer = made(params, transform, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    with pytest.raises(error, match=words):
        use()


def test_gradients_that_no_bank_holds_are_refused_with_the_parameters_name() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = made(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of weight \[5, 3\] is sparse"):
        optimizer.step()
    p = nn.Parameter(torch.ones(2))
    optimizer = made([p])
    p.grad_dtype = None  # torch then lets a gradient have another dtype
    p.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] \[2\] is torch.float64 on cpu"):
        optimizer.step()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step()


def test_groups_on_two_devices_are_refused() -> None:
    here, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    optimizer = made([{"params": [("here", here)]}, {"params": [("there", there)]}])
    here.grad, there.grad = torch.ones_like(here), torch.ones_like(there)
    with pytest.raises(ValueError, match="there of parameter group 1 lies on meta, parameter group 0 on cpu"):
        optimizer.step()


def test_an_empty_group_and_a_key_of_other_make_are_fine() -> None:
    """As HF's groups with and without decay, and timm's ``lr_scale``."""
    p = nn.Parameter(torch.ones(2))
    optimizer = made([{"params": [], "weight_decay": 0.0}, {"params": [p], "lr_scale": 0.5, "name": "head"}])
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert float(p.detach()[0]) < 1 and optimizer.param_groups[1]["name"] == "head"
