"""A large gradient is moved into its place during the backward, and every loop has the ordinary optimizer's numbers."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile._torch_optim import runs
from fusion_compile._torch_optim.moved_gradients import LARGE, MovedGradients
from fusion_compile.torch_optimizer import TorchOptimizer

STEPS = 5
X = torch.randn(STEPS, 3, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model() -> nn.Sequential:
    """Of three matrices that are moved, square ones, and small vectors that are copied; in fp64, so that two AdamW
    agree to far less than an error would make."""
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(64, 64, dtype=torch.float64) for _ in range(3)))
    assert weight(made, 0).nbytes == LARGE
    return made


def loss(net: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = net(x).square().mean() + net(x + 1).abs().mean()  # each weight is used twice
    return value


def weight(net: nn.Sequential, i: int) -> nn.Parameter:
    found = net[i].weight
    assert isinstance(found, nn.Parameter)
    return found


Seen = list[Any]
Loop = Callable[[nn.Sequential, torch.optim.Optimizer], Iterator[Seen]]


def grads(net: nn.Module) -> Seen:
    return [p.grad for p in net.parameters()]


def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def zeroed_in_place(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad(set_to_none=False)
        loss(net, x[0]).backward()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def accumulated_and_clipped(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        for micro in x:
            loss(net, micro).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        yield [norm, *(g.clone() for g in grads(net))]
        optimizer.zero_grad()


def never_zeroed(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        loss(net, x[0]).backward()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def of_several_tasks(net: nn.Module, optimizer: torch.optim.Optimizer, hold: Callable[[Tensor], Any]) -> Iterator[Seen]:
    """Gradient surgery: what each task's backward left is kept, and the mean is set by hand."""
    for x in X:
        tasks = []
        for micro in x:
            optimizer.zero_grad()
            loss(net, micro).backward()
            tasks.append([hold(g) for g in grads(net)])
        for p, *of_task in zip(net.parameters(), *tasks, strict=True):
            p.grad = torch.stack([torch.as_tensor(g).view_as(p) for g in of_task]).mean(0)
        optimizer.step()
        yield [torch.as_tensor(g).clone() for task in tasks for g in task]


def last_gradients_kept(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    """A monitor that compares a gradient with the step's before."""
    last: Seen = []
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        optimizer.step()
        yield [(g * k).sum() for g, k in zip(grads(net), last, strict=True)] if last else []
        last = [g.detach() for g in grads(net)]


def kept_where_none_comes(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    """The middle layer has no gradient in some steps, while somebody holds its last one."""
    held: Seen = []
    for i, x in enumerate(X):
        optimizer.zero_grad()
        out = net[2](net[0](x[0])) if i % 2 else net(x[0])
        out.square().mean().backward()
        if not i % 2:
            held = [weight(net, 1).grad]
        optimizer.step()
        yield [held[0].clone(), *(None if g is None else g.clone() for g in grads(net))]


def swapped(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        a, b = weight(net, 0), weight(net, 1)
        a.grad, b.grad = b.grad, a.grad
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def turned(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        weight(net, 0).grad = grads(net)[0].t()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def slices_of_one(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        [*net.parameters()][1].grad = grads(net)[0][1]
        weight(net, 1).grad = None
        optimizer.step()
        yield [None if g is None else g.clone() for g in grads(net)]


def hooks_of_others(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    """One keeps what it finds and scales it later; one replaces it."""
    found: list[Tensor] = []

    def keep(p: Tensor) -> None:
        assert p.grad is not None
        found.append(p.grad)

    def replace(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad.sign()

    handles = [weight(net, 0).register_post_accumulate_grad_hook(keep)]
    for i, x in enumerate(X):
        if i == 2:
            handles += [weight(net, 1).register_post_accumulate_grad_hook(f) for f in (keep, replace)]
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        torch._foreach_mul_(found, 0.5)
        optimizer.step()
        yield [g.clone() for g in (*found, *grads(net))]
        found.clear()
    for handle in handles:
        handle.remove()


def a_second_derivative(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward(create_graph=True)
        penalty = sum((g.square().sum() for g in grads(net)), torch.zeros((), dtype=torch.float64))
        penalty.backward()
        optimizer.step()
        yield [g.detach().clone() for g in grads(net)]
        optimizer.zero_grad()


def retained(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for x in X:
        optimizer.zero_grad()
        value = loss(net, x[0])
        value.backward(retain_graph=True)
        value.backward()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def in_one_flat_buffer(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    """As gradient buckets are: one memory for all, cleared and read as a whole."""
    flat = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    at = 0
    for p in net.parameters():
        p.grad = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    for x in X:
        flat.zero_()
        loss(net, x[0]).backward()
        flat.mul_(0.5)
        optimizer.step()
        yield [flat.clone()]


def uphill_later(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for i, x in enumerate(X):
        optimizer.param_groups[0]["maximize"] = i in (2, 3)
        loss(net, x[0]).backward()
        optimizer.step()
        yield [g.clone() for g in grads(net)]


def frozen_and_back(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> Iterator[Seen]:
    for i, x in enumerate(X):
        weight(net, 1).requires_grad_(i % 2 == 0)
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        optimizer.step()
        yield [None if g is None else g.clone() for g in grads(net)]


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "themselves": lambda g: g,
    "detached": lambda g: g.detach(),
    "flattened": lambda g: g.view(-1),
    "numpy": lambda g: g.numpy(),
}


def _tasks(hold: Callable[[Tensor], Any]) -> Loop:
    return lambda net, optimizer: of_several_tasks(net, optimizer, hold)


LOOPS: dict[str, Loop] = {
    **{
        loop.__name__: loop
        for loop in (
            plain,
            zeroed_in_place,
            accumulated_and_clipped,
            never_zeroed,
            last_gradients_kept,
            kept_where_none_comes,
            swapped,
            turned,
            slices_of_one,
            hooks_of_others,
            a_second_derivative,
            retained,
            in_one_flat_buffer,
            uphill_later,
            frozen_and_back,
        )
    },
    **{f"of_several_tasks, {name}": _tasks(hold) for name, hold in HOLDS.items()},
}


def momentum(net: nn.Module, *, moves: bool = True, **how: Any) -> TorchOptimizer:
    """Of one bank, whose numbers torch's SGD has: it sums up what ours averages, so the rate is a tenth there.

    `moves`: it declares that it needs the bank whole, so that gradients are not read where they lie.
    """
    made = optim.chain(optim.scale_by_momentum(0.9), optim.scale_by_learning_rate(0.1))
    if moves:
        made = made._replace(extras=made.extras._replace(pools="a test"))
    return optim.as_torch_optimizer(net, made, **(how or {"mode": "eager"}))


@pytest.mark.parametrize("moves", [True, False], ids=["moved", "where they lie"])
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_it_is_the_ordinary_optimizers_loop(name: str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are seen or held, and weights; in fp64, whose rounding is far below the bound."""
    monkeypatch.setattr(runs, "LARGE", LARGE)
    ours, theirs = model(), model()
    mine = momentum(ours, moves=moves)
    loops = LOOPS[name](ours, mine), LOOPS[name](theirs, torch.optim.SGD(theirs.parameters(), 0.01, 0.9))
    for seen, wanted in zip(*loops, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-9, atol=1e-12)
    (group,) = mine._inside.groups()
    assert group.piecewise is not moves and (moved(mine) is None or moves)


def moved(optimizer: TorchOptimizer) -> MovedGradients | None:
    (group,) = optimizer._inside.groups()
    return group._gradients._moved


def test_from_the_second_step_on_large_gradients_lie_in_their_places() -> None:
    net = model()
    optimizer, addresses = momentum(net), []
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        addresses.append([g.data_ptr() for g in grads(net)[::2]])
        optimizer.step()
    assert addresses[1:] == [addresses[1]] * (STEPS - 1)
    hooks = moved(optimizer)
    assert hooks is not None
    (group,) = optimizer._inside.groups()
    assert hooks.in_place({n: p.grad for n, p in group.members.items() if p.grad is not None}) == {
        f"{i}.weight" for i in range(3)
    }, "and the small ones are copied together"


def test_once_a_gradient_is_held_none_is_moved_any_more() -> None:
    net = model()
    optimizer = momentum(net)
    held = []
    for x in X:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        optimizer.step()
        held.append(weight(net, 0).grad)
    assert moved(optimizer) is None
    assert not weight(net, 0)._post_accumulate_grad_hooks
    assert len({g.data_ptr() for g in held if g is not None}) == STEPS


def test_a_dropped_optimizer_leaves_no_hook_and_no_memory() -> None:
    net = model()
    optimizer = momentum(net)
    for x in X[:2]:
        optimizer.zero_grad()
        loss(net, x[0]).backward()
        optimizer.step()
    hooks = moved(optimizer)
    assert hooks is not None
    places = [weakref.ref(place.tensor) for place in hooks._lent.values()]
    twin = copy.deepcopy(net)
    del optimizer, hooks
    gc.collect()
    assert not any(place() for place in places)
    assert not weight(net, 0)._post_accumulate_grad_hooks
    loss(twin, X[0, 0]).backward()
    assert not weight(twin, 0)._post_accumulate_grad_hooks


@pytest.mark.parametrize("as_view", [False, True])
def test_distributed_data_parallel_keeps_its_buckets(as_view: bool) -> None:
    """Of one process. It writes the mean over processes into ``.grad``, or ``.grad`` lies in its buckets."""
    with one_process():
        ours, theirs = model(), model()
        made = [nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=as_view) for net in (ours, theirs)]
        loops = plain(made[0], momentum(ours)), plain(made[1], torch.optim.SGD(theirs.parameters(), 0.01, 0.9))
        for seen, wanted in zip(*loops, strict=True):
            torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-9, atol=1e-12)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    distributed: Any = torch.distributed  # torch does not say that it exports the store
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_the_compiled_update_reads_other_banks_once_gradients_are_held() -> None:
    """Programs know the banks they were compiled with as memory that stays."""
    ours, theirs = model(), model()
    mine = momentum(ours, backend="aot_eager")
    loops = (
        last_gradients_kept(ours, mine),
        last_gradients_kept(theirs, torch.optim.SGD(theirs.parameters(), 0.01, 0.9)),
    )
    for seen, wanted in zip(*loops, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-9, atol=1e-12)
    assert len(mine._inside.programs) == 1 and moved(mine) is None
