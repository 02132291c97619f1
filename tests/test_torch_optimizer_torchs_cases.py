"""What PyTorch's own ``test_optim`` asks of every optimizer, asked of ours, with torch's AdamW beside it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

from fusion_compile import optim
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import batches, mlp
from tests.torch_loops import close_to_torch, equal, loss_of, made, train, weights

ELEMENTWISE = ("adamw", "lion", "sf_adamw")
BOTH: dict[str, Callable[..., Any]] = {"ours": optim.AdamW, "torch": torch.optim.AdamW}


def both(**options: Any) -> list[tuple[nn.Module, Any]]:
    """Our AdamW and torch's, each with a model of its own."""
    pairs: list[tuple[nn.Module, Any]] = []
    for who, cls in BOTH.items():
        model = mlp()
        pairs.append((model, cls(model.parameters(), **options, **({"mode": "eager"} if who == "ours" else {}))))
    return pairs


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.3, total_iters=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=5, power=0.9),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda i: 0.95**i),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda i: 0.95),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=1e-2, total_steps=9, cycle_momentum=False),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=2, cycle_momentum=False),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, factor=0.1, total_iters=2), lrs.ExponentialLR(o, gamma=0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, factor=0.1, total_iters=2), lrs.ExponentialLR(o, gamma=0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=5e-3, anneal_epochs=3),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_gives_torchs_run(name: str, tensor: bool) -> None:
    rates = []
    pairs = []
    for who, cls in BOTH.items():
        model = mlp()
        lr: Any = torch.tensor(1e-2) if tensor else 1e-2
        optimizer = cls(model.parameters(), lr=lr, **({"mode": "eager"} if who == "ours" else {}))
        scheduler, seen = SCHEDULERS[name](optimizer), []
        for batch in batches(6):
            train(model, optimizer, [batch], scheduler.step)
            seen.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))  # it goes on where it was
        rates.append(seen)
        pairs.append(model)
    assert rates[0] == rates[1] and len(set(rates[0])) > 1
    close_to_torch(*pairs)


def test_groups_with_numbers_of_their_own() -> None:
    found = []
    for who, cls in BOTH.items():
        model = mlp()
        p = list(model.parameters())
        groups: list[Any] = [{"params": p[:1], "lr": 3e-2}, {"params": p[1:3], "weight_decay": 0.5}, {"params": p[3]}]
        optimizer = cls(groups, lr=1e-2, **({"mode": "eager"} if who == "ours" else {}))
        train(model, optimizer, batches(4))
        found.append(model)
    close_to_torch(*found)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_it_goes_downhill(name: str) -> None:
    """Rosenbrock's banana, as in ``test_optim``."""
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = made([p], name, lr={"lion": 2e-3}.get(name, 1e-2))

    def height() -> Tensor:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    start = float(height().detach())
    for _ in range(100):
        optimizer.zero_grad()
        height().backward()
        optimizer.step()
    optimizer.eval()
    assert float(height().detach()) < 0.1 * start


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "is given twice"),
        (lambda p: [p, p], ValueError, "is given twice"),
        (lambda p: [{"params": {p}}], TypeError, "ordered collections"),
        (lambda p: p, TypeError, "params is a Parameter"),
        (lambda p: [], ValueError, "was given no parameters"),
        (lambda p: ["w"], TypeError, "is a str; an optimizer takes parameters"),
        (lambda p: [p * 2], ValueError, "is the result of a computation"),
        (lambda p: [{"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}], ValueError, "complex"),
    ],
)
def test_error_inputs(params: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
    def use() -> None:
        optimizer = optim.AdamW(params(nn.Parameter(torch.ones(2))), mode="eager")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()

    with pytest.raises(error, match=words):
        use()


@pytest.mark.parametrize(
    "option", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (1.0, 0.9)}], ids=str
)
def test_the_error_inputs_of_torchs_adamw_are_ours(option: dict[str, Any]) -> None:
    for who, cls in BOTH.items():
        with pytest.raises(ValueError):
            cls(mlp().parameters(), **option, **({"mode": "eager"} if who == "ours" else {}))


def test_gradients_of_zero_move_only_what_decays() -> None:
    for model, optimizer in both(weight_decay=0.0):
        train(model, optimizer, batches(2))
        for state in optimizer.state.values():
            for part, t in state.items():
                if part in ("exp_avg", "0.mu"):
                    t.zero_()
        start = weights(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert equal(weights(model), start)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_parameter_without_entries(name: str) -> None:
    empty, other = nn.Parameter(torch.ones(5, 1, 0)), nn.Parameter(torch.ones(3))
    optimizer = made([empty, other], name)
    empty.grad, other.grad = torch.zeros_like(empty), torch.ones_like(other)
    optimizer.step()
    assert empty.shape == (5, 1, 0) and not torch.equal(other, torch.ones(3))


def test_parameters_of_several_dtypes_in_one_group() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    params = [nn.Parameter(torch.full((4,), 0.5, dtype=dtype)) for dtype in dtypes]
    optimizer = made(params, optim.adamw(lr=1e-2, weight_decay=0.0))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        assert torch.equal(p, torch.full((4,), 0.49).to(p.dtype))


def test_under_another_default_dtype() -> None:
    (expected, model), data = (mlp(), mlp()), batches(2)
    train(expected, made(expected), data)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        train(model, made(model), data)
    finally:
        torch.set_default_dtype(before)
    assert equal(weights(model), weights(expected))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_loaded_state_goes_on_in_the_same_way_twice(name: str) -> None:
    model = mlp()
    optimizer = made(model, name)
    train(model, optimizer, batches(3))
    optimizer.eval()
    at = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(2):
        model.load_state_dict(at[0])
        optimizer.load_state_dict(copy.deepcopy(at[1]))
        optimizer.train()
        train(model, optimizer, batches(3))
        optimizer.eval()
        ends.append(weights(model))
    assert equal(*ends)


@pytest.mark.parametrize(("saved_named", "loads_named"), [(True, False), (False, True)])
def test_a_state_with_names_loads_where_there_are_none_and_the_other_way_round(
    saved_named: bool, loads_named: bool
) -> None:
    def begun(named: bool) -> tuple[nn.Module, TorchOptimizer]:
        model = mlp()
        return model, made(model.named_parameters() if named else model.parameters())

    model, optimizer = begun(saved_named)
    train(model, optimizer, batches(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other = begun(loads_named)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, batches(4)[2:])
    assert equal(weights(model), weights(again))


def test_it_is_printed_with_its_numbers() -> None:
    shown = repr(optim.AdamW(mlp().parameters(), lr=0.25, mode="eager"))
    assert shown.startswith("AdamW (") and "lr: 0.25" in shown and "betas: (0.9, 0.999)" in shown


def test_hooks_run_as_in_torch_global_ones_too() -> None:
    said = []
    for who, (model, optimizer) in zip(BOTH, both(), strict=True):
        told: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *a, told=told: told.append("global pre")),
            register_optimizer_step_post_hook(lambda *a, told=told: told.append("global post")),
            optimizer.register_step_pre_hook(lambda *a, told=told: told.append("pre")),
            optimizer.register_step_post_hook(lambda *a, told=told: told.append("post")),
            optimizer.register_state_dict_pre_hook(lambda o, told=told: told.append("state_dict pre")),
            optimizer.register_state_dict_post_hook(lambda o, s, told=told: told.append("state_dict post 2")),
            optimizer.register_state_dict_post_hook(
                lambda o, s, told=told: told.append("state_dict post 1"), prepend=True
            ),
            optimizer.register_load_state_dict_pre_hook(lambda o, s, told=told: told.append("load pre 2")),
            optimizer.register_load_state_dict_pre_hook(
                lambda o, s, told=told: told.append("load pre 1"), prepend=True
            ),
            optimizer.register_load_state_dict_post_hook(lambda o, told=told: told.append("load post")),
        ]
        train(model, optimizer, batches(2))
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        train(model, optimizer, batches(1))
        said.append(told)
        assert who in BOTH
    assert said[0] == said[1] and len(said[0]) == 14


def test_a_hook_before_the_step_may_change_its_arguments() -> None:
    for model, optimizer in both():
        loss_of(model, batches(1)[0]).backward()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
        assert optimizer.step() == 7.0


def test_copies_hold_copies_of_the_parameters() -> None:
    for model, optimizer in both():
        train(model, optimizer, batches(2))
        again = copy.deepcopy(optimizer)
        ours, theirs = optimizer.param_groups[0]["params"], again.param_groups[0]["params"]
        assert all(p is not q and torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        assert {id(p) for p in again.state} == {id(p) for p in theirs}
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_state_goes_through_a_file_that_allows_tensors_only() -> None:
    model = mlp()
    optimizer = made(model, lr=torch.tensor(1e-2))
    train(model, optimizer, batches(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = made(again := mlp(), lr=torch.tensor(0.5))
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for m, o in ((model, optimizer), (again, fresh)):
        train(m, o, batches(2))
    assert equal(weights(model), weights(again)) and float(fresh.param_groups[0]["lr"]) == pytest.approx(1e-2)
