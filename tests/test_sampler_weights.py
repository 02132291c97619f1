"""A sampler follows its model's weights, and gives back the memory of those that the loop does not read."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from dit import DiT
from torch import Tensor, nn

from fusion_compile.sampler import Sampler, optimize_sampler

N_STEPS = 3
X, Y, OTHER = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])


def random_dit(num_classes: int | None = 10) -> DiT:
    model = DiT(hidden_size=32, depth=1, num_heads=2, num_classes=num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def make(model: nn.Module) -> Sampler:
    sampler = optimize_sampler(model, N_STEPS, mode="eager")
    difference(sampler)
    return sampler


def difference(sampler: Sampler, model: nn.Module | None = None, y: Tensor = Y, t: float | None = None) -> float:
    """The largest over the schedule, or at `t`."""
    times = sampler.timesteps if t is None else torch.tensor([t])
    with torch.no_grad():
        calls = [(X, t.expand(2), y)[: 2 + (sampler.model.num_classes is not None)] for t in times]
        return max(float((sampler(*call) - (model or sampler.model)(*call)).abs().max()) for call in calls)


class WithAnotherEntrance(DiT):
    """Has a head that `forward` computes and does not return, and one that only another method reads."""

    def __init__(self) -> None:
        super().__init__(hidden_size=32, depth=1, num_heads=2, num_classes=None)
        self.unused, self.encoder = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        self.unused(x)
        return super().forward(x, t)


def test_weights_on_which_nothing_depends_go_only_when_asked() -> None:
    model = WithAnotherEntrance().eval()
    times = torch.linspace(1, 0.2, N_STEPS)
    sampler = optimize_sampler(model, N_STEPS, mode="eager", timesteps=times)
    with torch.no_grad():
        want = [sampler(X, t.expand(2)) for t in times]
        hoisted = sampler.release_weights(to="drop")
        assert model.unused.weight.numel() == 64 and model.encoder.weight.numel() == 128
        unread = sampler.release_weights(to="drop", unread=True)
        assert hoisted > 0 and unread == 4 * (64 + 8 + 128 + 16)
        assert model.unused.weight.numel() == model.encoder.weight.numel() == 0
        for t, before in zip(times, want, strict=True):
            assert torch.equal(sampler(X, t.expand(2)), before)
        assert sampler.report.programs[0].weight_bytes["unread"] == unread


def _optimizer_step(model: DiT) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _in_place(model: DiT) -> None:
    with torch.no_grad():
        model.t_embedder.mlp[0].weight.mul_(2)  # type: ignore[operator]


def _replaced(model: DiT) -> None:
    model.t_embedder.mlp[0].weight = nn.Parameter(torch.randn(32, 256))


def _data_assigned(model: DiT) -> None:
    model.t_embedder.mlp[0].weight.data = torch.randn(32, 256)


CHANGES: list[Callable[[DiT], object]] = [
    lambda model: model.load_state_dict(random_dit(model.num_classes).state_dict()),
    _in_place,
    _optimizer_step,
    _replaced,
    _data_assigned,
]


@pytest.mark.parametrize(
    ("num_classes", "change"),
    [*((10, change) for change in CHANGES), (None, _in_place)],
    ids=["load_state_dict", "in place", "optimizer", "replaced", "data assigned", "time alone"],
)
@pytest.mark.filterwarnings("ignore:.*the sampler is built again")
def test_tables_follow_every_change_of_the_weights(change: Callable[[DiT], object], num_classes: int | None) -> None:
    model = random_dit(num_classes)
    sampler = make(model)
    with torch.no_grad():
        before = sampler(X, sampler.timesteps[:1].expand(2), *([Y] if num_classes else []))
    change(model)
    assert difference(sampler) == 0
    with torch.no_grad():
        assert not torch.equal(before, sampler(X, sampler.timesteps[:1].expand(2), *([Y] if num_classes else [])))


def test_weights_that_are_views_of_a_bank_written_by_a_compiled_program_are_followed() -> None:
    """As a training step writes them: the view was installed by ``.data =`` and shares no version with its bank."""
    model = random_dit()
    bank = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    offset = 0
    for p in model.parameters():
        p.data = bank[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()

    def program(bank: Tensor) -> None:
        bank.mul_(1.5)

    train = torch.compile(program, backend="aot_eager", fullgraph=True)
    sampler = make(model)
    version = model.t_embedder.mlp[0].weight._version
    train(bank)
    assert model.t_embedder.mlp[0].weight._version == version
    assert difference(sampler) == 0
    with pytest.warns(UserWarning, match="part of a larger storage"):
        assert sampler.release_weights(to="drop") == 0
    assert difference(sampler) == 0
    own = make(copy.deepcopy(model))
    assert own.release_weights(to="drop") > 0


def test_writes_through_data_are_seen_by_sample_and_prepare_or_after_invalidate() -> None:
    model = random_dit()
    sampler = make(model)
    sampler.sample(X, Y)
    for p in model.parameters():
        p.data.mul_(1.1)
    assert torch.equal(sampler.sample(X, Y), make(model).sample(X, Y))
    for p in model.parameters():
        p.data.mul_(1.1)
    sampler.invalidate()
    assert difference(sampler) == 0


def alive(addresses: set[int]) -> set[int]:
    """Which of the storages some tensor in this process still holds."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return {
        t.untyped_storage().data_ptr() for t in tensors if t.layout is torch.strided and t.is_cpu and t.numel()
    } & addresses


def test_drop_gives_the_bytes_back_and_prepared_requests_are_served_on() -> None:
    model, twin = random_dit(), random_dit()
    twin.load_state_dict(model.state_dict())
    sampler = make(model)
    hoisted = [*model.t_embedder.parameters(), *model.y_embedder.parameters()]  # type: ignore[union-attr]
    hoisted += [p for n, p in model.named_parameters() if "adaLN" in n]
    expected = sum(p.numel() * p.element_size() for p in hoisted)
    addresses = {p.untyped_storage().data_ptr() for p in hoisted}
    assert alive(addresses) == addresses
    assert sampler.release_weights(to="drop") == expected
    assert alive(addresses) == set()
    assert difference(sampler, twin) == 0
    assert torch.equal(sampler.sample(X, Y), make(twin).sample(X, Y))
    with pytest.raises(RuntimeError, match="a new request needs weights"):
        difference(sampler, twin, y=OTHER)
    with pytest.raises(RuntimeError, match="not in the sampler's schedule"):
        difference(sampler, twin, t=0.1)
    with pytest.raises(RuntimeError, match="a new shape needs weights"):
        sampler(X[:1], torch.ones(1), Y[:1])
    assert difference(sampler, twin) == 0
    with pytest.raises(ValueError, match="were dropped and nothing was given"):
        sampler.restore_weights()
    sampler.restore_weights(twin.state_dict())
    assert difference(sampler, y=OTHER) == 0 and difference(sampler, twin, y=OTHER) == 0


def test_memory_that_something_else_holds_is_neither_given_back_nor_lost() -> None:
    model = random_dit(None)
    sampler = make(model)
    held = [p.data for p in model.parameters()]
    with pytest.warns(UserWarning, match="something holds its memory"):
        assert sampler.release_weights(to="drop") == 0
    assert all(p.is_set_to(place) for p, place in zip(model.parameters(), held, strict=True))
    assert difference(sampler) == 0


def test_drop_may_keep_what_a_new_request_needs() -> None:
    model, twin = random_dit(), random_dit()
    twin.load_state_dict(model.state_dict())
    sampler = make(model)
    released = sampler.release_weights(to="drop", keep_prologue=True)
    assert released == sum(p.numel() * p.element_size() for p in twin.t_embedder.parameters())
    assert difference(sampler, twin, y=OTHER) == 0


def test_what_was_moved_to_the_cpu_is_fetched_when_needed() -> None:
    """On a CPU there is nowhere to move to; the same rooms with the contents put beside are what a GPU does."""
    sampler = make(random_dit())
    assert sampler.release_weights(to="cpu") == 0
    assert difference(sampler, y=OTHER) == 0

    twin = random_dit()
    model = random_dit()
    model.load_state_dict(twin.state_dict())
    sampler = make(model)
    assert sampler.release_weights(to="drop") > 0
    weights = sampler._weights
    weights._kept = {n: twin.get_parameter(n).detach() for n in weights.names}
    assert difference(sampler, twin, y=OTHER) == 0
    assert difference(sampler, twin, t=0.1, y=OTHER) == 0  # learned
    assert model.get_parameter("t_embedder.mlp.0.weight").numel() == 0
    sampler.restore_weights()
    assert difference(sampler) == 0 and difference(sampler, twin) == 0


def test_a_hoisted_weight_that_the_body_also_reads_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.num_classes = None

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.second(x) * self.first(t[:, None].expand(-1, 4))
            return out

    sampler = optimize_sampler(Tied().eval(), N_STEPS, mode="eager")
    sampler(torch.randn(2, 4), torch.ones(2))
    assert sampler.release_weights(to="drop") == 4 * 4  # the bias of `first`
    assert sampler(torch.randn(2, 4), torch.ones(2)).shape == (2, 4)


def test_a_weight_with_two_names_is_given_back_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.num_classes = None

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.last(x) * self.second(self.first(t[:, None].expand(-1, 4)).relu())
            return out

    model = Shared().eval()
    twin = copy.deepcopy(model)
    sampler = optimize_sampler(model, N_STEPS, mode="eager")
    x = torch.randn(2, 4)
    sampler(x, torch.ones(2))
    assert sampler.release_weights(to="drop") == 4 * (4 * 4 + 4 + 4)
    assert model.first.weight is model.second.weight and model.second.weight.numel() == 0
    with torch.no_grad():
        assert torch.equal(sampler(x, torch.ones(2)), twin(x, torch.ones(2)))
    sampler.restore_weights(twin.state_dict())
    assert model.first.weight is model.second.weight and torch.equal(model.first.weight, twin.first.weight)


def test_freeing_before_anything_was_hoisted_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was hoisted yet"):
        optimize_sampler(random_dit(), N_STEPS).release_weights(to="drop")
    with pytest.raises(ValueError, match="use 'drop', or a device that is there, such as 'cpu'"):
        make(random_dit()).release_weights(to="disk")
