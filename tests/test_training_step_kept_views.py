"""Views that user code keeps of a parameter or a buffer see what stands there, as in the ordinary loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import batches, compiled, torch_loop

pytestmark = pytest.mark.filterwarnings("ignore:the step is captured by running it")
WAYS: dict[str, dict[str, Any]] = {"run": {"capture": "run"}, "eager": {"mode": "eager"}}
Made = tuple[nn.Module, Callable[..., Tensor], Callable[[], list[Tensor]]]
"""A model, its loss, and what user code reads afterwards."""


class Statistic(nn.Module):
    """Moves a buffer, or a part of it, and reads what `keep` keeps of it."""

    def __init__(self, keep: Callable[[Tensor], Any], *, writes_the_part: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2, 2))
        self.kept, self.writes_the_part = keep(self.get_buffer("mean")), writes_the_part

    def part(self) -> Tensor:
        found = next(iter(self.kept.values())) if isinstance(self.kept, dict) else self.kept
        return found[0] if isinstance(found, list) or found.ndim > 1 else found

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        with torch.no_grad():
            target = self.part() if self.writes_the_part else self.get_buffer("mean")
            target.mul_(0.5).add_(out.detach().mean(0))
        return out - self.part() - self.get_buffer("mean")[0]


class TwoRegistered(nn.Module):
    """A buffer, and a part of it that is a buffer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, flat = nn.Linear(4, 2), torch.zeros(6)
        self.register_buffer("flat", flat)
        self.register_buffer("end", flat[4:])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        with torch.no_grad():
            self.get_buffer("end").mul_(0.5).add_(out.detach().mean(0))
        return out - self.get_buffer("flat")[4:]


class Replaced(nn.Module):
    """Replaces a buffer; whoever keeps the first one, or a view of it, keeps its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.first, self.view = [self.get_buffer("mean")], self.get_buffer("mean")[:1]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        self.mean = 0.5 * self.get_buffer("mean") + out.detach().mean(0)
        return out - self.mean + self.view + self.first[0]


class Weights(nn.Module):
    """Reads what `keep` keeps of a weight beside the weight."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.kept = keep(self.linear.weight)

    def part(self) -> Tensor:
        found: Tensor = self.kept[0] if isinstance(self.kept, (list, tuple)) else self.kept
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.part().square().sum() * x.mean()


class Flat(nn.Module):
    """Computes with two parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.linspace(-1, 1, 10))
        self.weight, self.bias = self.flat[:8].view(2, 4), self.flat[8:]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def of_a_buffer(keep: Callable[[Tensor], Any], **how: Any) -> Made:
    model = Statistic(keep, **how)
    return model, error, lambda: [model.part(), model.get_buffer("mean")]


def of_a_weight(keep: Callable[[Tensor], Any]) -> Made:
    model = Weights(keep)
    return model, error, lambda: [model.part()]


def of_the_model(model: nn.Module, *names: str) -> Made:
    return model, error, lambda: [getattr(model, name) for name in names]


def clamped_through_data() -> Made:
    model = nn.Linear(4, 2)
    data = model.weight.data

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        data.clamp_(-0.3, 0.3)
        return error(net, x, y)

    return model, loss, lambda: [data]


def view_beside_its_base() -> Made:
    """Neither belongs to the model."""
    base = torch.zeros(4)
    view = base[:2]

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = net(x)
        base.mul_(0.5).add_(out.detach().mean())
        return (out - view - y).square().mean()

    return nn.Linear(4, 2), loss, lambda: [base, view]


PROGRAMS: dict[str, Callable[[], Made]] = {
    "row": lambda: of_a_buffer(lambda b: b[0]),
    "row in a list": lambda: of_a_buffer(lambda b: [b[0]]),
    "row in a dictionary": lambda: of_a_buffer(lambda b: {"mean": b[0]}),
    "detached": lambda: of_a_buffer(torch.Tensor.detach),
    "data": lambda: of_a_buffer(lambda b: b.data),
    "transposed": lambda: of_a_buffer(lambda b: b.t()),
    "written row": lambda: of_a_buffer(lambda b: b[0], writes_the_part=True),
    "written data": lambda: of_a_buffer(lambda b: b.data, writes_the_part=True),
    "rows": lambda: of_a_buffer(lambda b: list(b.unbind(0)), writes_the_part=True),
    "two registered": lambda: of_the_model(TwoRegistered(), "flat", "end"),
    "replaced": lambda: of_the_model(Replaced(), "mean", "view"),
    "weight.data": lambda: of_a_weight(lambda w: w.data),
    "weight detached, in a tuple": lambda: of_a_weight(lambda w: (w.detach(),)),
    "weight.view": lambda: of_a_weight(lambda w: w.view(8)),
    "weight transposed": lambda: of_a_weight(lambda w: w.t()),
    "row of a weight": lambda: of_a_weight(lambda w: w[1]),
    "parts of a flat parameter": lambda: of_the_model(Flat(), "weight", "bias"),
    "clamped through data": clamped_through_data,
    "view beside its base": view_beside_its_base,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_is_the_ordinary_loops(program: str, way: str) -> None:
    runs = []
    for own in (False, True):
        torch.manual_seed(1)
        model, loss, read = PROGRAMS[program]()
        data = batches(3)
        losses = (
            [step(*b) for step in [compiled(model, loss, lr=0.1, **WAYS[way])] for b in data]
            if own
            else torch_loop(model, data, loss, lr=0.1)
        )
        runs.append([*losses, *model.parameters(), *model.buffers(), *read()])
    for got, wanted in zip(runs[1], runs[0], strict=True):  # AdamW's fused arithmetic rounds otherwise
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("program", "way"), [("row of a weight", "run"), ("weight.data", "eager")])
def test_under_schedule_free_they_see_the_point_of_the_gradient(program: str, way: str) -> None:
    """In a torch optimizer the parameters hold y themselves, and views see it without anybody's help."""
    (theirs, loss, _), (model, _, read) = PROGRAMS[program](), PROGRAMS[program]()
    theirs.load_state_dict(model.state_dict())
    data, recipe = batches(3), fc.optim.sf_adamw(0.1)
    optimizer = fc.optim.as_torch_optimizer(theirs, recipe, backend="eager")
    step = fc.compile_training_step(model, loss, optimizer=recipe, **{"backend": "aot_eager", **WAYS[way]})
    for batch in data:
        optimizer.zero_grad()
        wanted = loss(theirs, *batch)
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(step(*batch), wanted.detach(), rtol=2e-5, atol=2e-6)
    weight = model.get_parameter("linear.weight")
    assert torch.equal(read()[0], weight[1] if program.startswith("row") else weight)  # x again


@pytest.mark.parametrize("program", ["row", "weight.data"])
def test_none_runs_what_reading_does_not_see(program: str) -> None:
    model, loss, _ = PROGRAMS[program]()
    step = compiled(model, loss)
    step(*batches(1)[0])
    assert step.programs[0].captured_by == "run"


def test_reading_refuses_what_it_does_not_see() -> None:
    model, loss, _ = PROGRAMS["row"]()
    with pytest.raises(ValueError, match=r"the loss reads mean where it is kept outside of the model"):
        compiled(model, loss, capture="read")(*batches(1)[0])


@pytest.mark.parametrize("way", WAYS)
def test_parts_that_overlap_and_lie_in_none_are_refused(way: str) -> None:
    class Parts(TwoRegistered):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.zeros(8)
            self.flat, self.end = whole[:6], whole[4:6]
            self.register_buffer("after", whole[3:])

    with pytest.raises(ValueError, match=r"changes \w+ \[\d\], which shares memory with another tensor of the model"):
        compiled(Parts(), error, **WAYS[way])(*batches(1)[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_flat_tensor_of_which_parameters_were_cut_is_refused_where_the_loss_reads_it(way: str) -> None:
    flat = torch.linspace(-1, 1, 10)
    model = nn.Linear(4, 2)
    model.weight, model.bias = nn.Parameter(flat[:8].view(2, 4)), nn.Parameter(flat[8:])

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return error(net, x, y) + flat.square().sum()

    with pytest.raises(ValueError, match=r"\[10\] torch.float32 that shares memory with several parameters"):
        compiled(model, loss, **WAYS[way])(*batches(1)[0])


def test_the_model_given_back_has_its_views_again() -> None:
    model, loss, read = PROGRAMS["weight.data"]()
    step = compiled(model, loss, mode="eager")
    step(*batches(1)[0])
    step.release()
    with torch.no_grad():
        next(model.parameters()).fill_(3.0)
    assert read()[0].eq(3).all()
