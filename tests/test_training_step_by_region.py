"""granularity="region": the step in regions is bit for bit its graph as one program, each block compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._program import regions, shared_regions
from fusion_compile._program.lower import lower_graph
from fusion_compile._step import by_running
from tests.small_models import bits, differing

QUICK = ("adamw", "sf_normuon")
RECIPES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in fc.optim.RECIPES]


class Block(nn.Module):
    """Attention, a normalization and two layers."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + F.dropout(F.gelu(x), self.dropout, self.training)


class Blocks(nn.Module):
    def __init__(self, depth: int = 2, *, width: int = 8, dropout: float = 0.0, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, 1)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.last(x)


class Convolutions(nn.Module):
    """Batch normalization in every block: its statistics are buffers that the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 1), nn.Tanh())
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) * 0.5
        return x


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).float() - y).square().mean()


def data(i: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(i)
    return torch.randn(rows, 3, 6, generator=source), torch.randn(rows, 3, 1, generator=source)


def pictures(i: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(i)
    return torch.randn(4, 4, 5, 5, generator=source), torch.randn(4, 4, 5, 5, generator=source)


def by_region(model: nn.Module | None = None, **options: Any) -> fc.TrainingStep:
    given: dict[str, Any] = {"optimizer": "adamw", "backend": "eager", "granularity": "region", **options}
    return fc.compile_training_step(model or Blocks(), squared, **given)


def unfolded(graph: fx.GraphModule, inputs: Sequence[Tensor], shared: object, **options: Any) -> regions.ByRegion:
    """The graph that would be lowered by region, as one program."""
    return regions.ByRegion(lower_graph(graph, inputs, **options), ())


def both_ways(
    make: Callable[[], nn.Module], data: Callable[[int], tuple[Tensor, ...]] = data, **options: Any
) -> tuple[fc.TrainingStep, list[str]]:
    """Three steps of one graph, unfolded and in regions: the step in regions, and what differs."""
    found: list[Any] = []
    steps = []
    for how in (unfolded, regions.lower_by_region):
        given = {key: value() if key == "ema" else value for key, value in options.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(by_running, "lower_by_region", how)
            step = by_region(make(), **given)
            torch.manual_seed(5)
            losses = [float(step(*data(i))) for i in range(3)]
        found.append({**bits(step), "losses": losses, "random": torch.get_rng_state().tolist()})
        steps.append(step)
    assert not steps[0].programs[0].compiled and steps[1].programs[0].compiled
    return steps[1], differing(*found)


def repeated(step: fc.TrainingStep) -> list[int]:
    return repeated_in(step.programs[0])


def repeated_in(program: Any) -> list[int]:
    return [region.called for region in program.compiled if region.repeats]


@pytest.mark.parametrize("recipe", RECIPES)
def test_regions_are_the_graph_bit_for_bit(recipe: str) -> None:
    # AOTAutograd makes a region's writes functional, as Inductor gets them; once will do.
    backend = "aot_eager" if recipe == "adamw" else "eager"
    step, differ = both_ways(lambda: Blocks(3, width=128), optimizer=recipe, clip_grad_norm=0.1, backend=backend)
    assert differ == [] and repeated(step) == [3, 3]


@pytest.mark.parametrize(
    "make, data, options",
    [
        pytest.param(lambda: Blocks(dropout=0.3), data, {}, id="dropout"),
        pytest.param(Convolutions, pictures, {}, id="batch normalization"),
        pytest.param(Blocks, data, {"accumulate": 2}, id="accumulation", marks=pytest.mark.exhaustive),
        pytest.param(lambda: Blocks(recompute=True), data, {}, id="checkpointing", marks=pytest.mark.exhaustive),
        pytest.param(lambda: Blocks(recompute=True, dropout=0.3), data, {"accumulate": 2}, id="all of them"),
        pytest.param(
            lambda: Blocks().bfloat16(),
            data,
            {"half_precision": "stochastic"},
            id="half precision",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Blocks,
            data,
            {"compute_dtype": torch.bfloat16, "keep_gradients": True},
            id="autocast",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Blocks,
            data,
            {"ema": lambda: fc.EMA(decay=0.9), "optimizer": "prodigy"},
            id="an EMA",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_with(make: Callable[[], nn.Module], data: Callable[[int], tuple[Tensor, ...]], options: Any) -> None:
    step, differ = both_ways(make, data, **options)
    assert differ == [] and repeated(step)


def weights(step: fc.TrainingStep) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in step.model.parameters()]


def test_without_a_bound_the_weights_are_those_of_the_step_compiled_as_one() -> None:
    """The norm, which alone is summed up in another order, scales nothing."""
    step, plain = by_region(), by_region(granularity="program", capture="run")
    for i in range(3):
        assert torch.equal(step(*data(i)), plain(*data(i)))
    assert weights(step) == weights(plain)


def test_numbers_are_live_and_a_step_that_is_not_finite_changes_nothing() -> None:
    step = by_region(lr=1e-2)
    step(*data(1))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    x, y = data(2)
    step(x * torch.inf, y)
    assert all(torch.equal(before[name], p) for name, p in step.model.named_parameters())
    assert int(step.metrics["skipped"]) == 1
    step.hyperparameters["lr"] = 0.0
    step.hyperparameters["weight_decay"] = 0.0
    step(*data(3))
    assert all(torch.equal(before[name], p) for name, p in step.model.named_parameters())
    step.hyperparameters["lr"] = 1e-2
    step(*data(3))
    assert not all(torch.equal(before[name], p) for name, p in step.model.named_parameters())


def test_each_shape_has_its_regions_and_a_resumed_run_goes_on_bit_for_bit() -> None:
    step = by_region(optimizer="adamw")
    for i, rows in enumerate((4, 2, 4)):
        step(*data(i, rows))
    assert [repeated_in(program) for program in step.programs] == [[2, 2], [2, 2]]
    optimizers = [[r.is_shared for r in program.compiled if "optimizer" in r.parts] for program in step.programs]
    assert optimizers == [[False], [True]]
    saved = step.state_dict()
    other = by_region(optimizer="adamw")
    other.load_state_dict(saved)
    for i in (4, 5):
        step(*data(i))
        other(*data(i))
    assert differing(bits(step), bits(other)) == []


def test_explain_lists_the_regions() -> None:
    step = by_region()
    step(*data(1))
    text = str(step.explain())
    assert "Program 0: 5 regions, each compiled once, called 7 times in a step" in text
    assert text.count("a block") == 2


def test_a_step_in_regions_is_run_and_can_be_released() -> None:
    step = by_region()
    step(*data(1))
    assert step.programs[0].captured_by == "run"
    assert isinstance(step.release(), Blocks)


def test_where_nothing_repeats_there_is_one_region() -> None:
    step = by_region(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)))
    step(*data(1))
    assert [(r.called, r.repeats) for r in step.programs[0].compiled] == [(1, False)]


def test_regions_that_are_not_the_loops_give_way_to_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: fx.GraphModule, *given: Any, **options: Any) -> Any:
        compiled = lower_graph(graph, *given, **options)
        return lambda *inputs: [value * 2 for value in compiled(*inputs)]

    monkeypatch.setattr(shared_regions, "lower_graph", wrong)
    step, plain = by_region(), by_region(granularity="program", capture="run")
    with pytest.warns(UserWarning, match=r"the step is compiled as one, because in regions its loss is"):
        step(*data(1))
    plain(*data(1))
    assert not step.programs[0].compiled and weights(step) == weights(plain)
    assert "compiled as one, because in regions" in str(step.explain())
