"""Batch shapes: one program for each, or one symbolic program for a band of sizes, with the same numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step.batches import Signature, signature
from fusion_compile._step.shapes import Bands, marks, refuse_too_many
from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop

CPU = torch.device("cpu")
ONE = torch.zeros(2, 4)


def of(*batch: Any) -> Signature:
    return signature(batch, CPU)


# -- bands -------------------------------------------------------------------------------------------------------------


def test_two_shapes_open_a_band_that_serves_others() -> None:
    bands = Bands(dynamic=True)
    first, second, third = (of({"x": torch.zeros(n, 4), "y": torch.zeros(n)}, True) for n in (2, 3, 7))
    assert bands.opened_by(first, []) is None and bands.key_of(third) == third
    band = bands.opened_by(second, [first])
    assert band is not None and band.dims == ((0,), (0,))
    bands.open(band, second)
    assert bands.key_of(third) == bands.key_of(second) == band.signature
    other = of({"x": torch.zeros(7, 5), "y": torch.zeros(7)}, True)
    assert bands.key_of(other) == other
    assert bands.key_of(of({"x": torch.zeros(7, 4), "y": torch.zeros(7)}, False)) != band.signature


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.zeros(2, 4),), (torch.zeros(2, 4, 1),)),
        ((torch.zeros(2, 4),), (torch.zeros(3, 4, dtype=torch.float64),)),
        ((torch.zeros(2, 4),), (torch.zeros(4, 3).t(),)),
        ((torch.zeros(2, 4), "a"), (torch.zeros(3, 4), "b")),
        ((torch.zeros(2, 4), None), (torch.zeros(3, 4),)),
        ((torch.zeros(2, 4),), (torch.zeros(2, 4),)),
        ((ONE, ONE), (torch.zeros(3, 4), torch.zeros(3, 4))),
    ],
    ids=["rank", "dtype", "strides", "string", "parts", "equal", "one tensor twice"],
)
def test_shapes_that_differ_in_more_than_sizes_open_none(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert Bands(dynamic=True).opened_by(of(*one), [of(*other)]) is None
    assert Bands(dynamic=False).opened_by(of(torch.zeros(2)), [of(torch.zeros(3))]) is None
    assert Bands(dynamic=True).opened_by(of(torch.zeros(1)), [of(torch.zeros(3))]) is None
    assert Bands(dynamic=True).opened_by(of(torch.zeros(3)), [of(torch.zeros(1))]) is not None


def test_a_shape_that_the_bands_program_refuses_gets_its_own_once() -> None:
    bands = Bands(dynamic=True)
    two, three, one = (of(torch.zeros(n, 4)) for n in (2, 3, 1))
    band = bands.opened_by(three, [two])
    assert band is not None
    bands.open(band, three)
    assert not bands.gives_up(three)  # it served this one: something else has changed
    assert bands.gives_up(one) and bands.key_of(one) == one
    bands.forget()
    assert bands.key_of(two) == two


def test_marks_and_bounds() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2)
    assert [(t is x, axis) for t, axis in marks(({"x": x}, y), ((0, 1), (0,)))] == [(True, 0), (True, 1), (False, 0)]
    refuse_too_many(of(x), [of(x)], 1, of_this_shape=0)
    with pytest.raises(ValueError, match="batch shape number 2"):
        refuse_too_many(of(y[:1]), [of(y)], 1, of_this_shape=0)
    with pytest.raises(ValueError, match="program number 9 for one batch shape"):
        refuse_too_many(of(x), [of(x)], 1, of_this_shape=8)


# -- the step ----------------------------------------------------------------------------------------------------------


def test_one_program_serves_a_band_and_the_numbers_are_the_ordinary_loops() -> None:
    """Sizes 8 (a program of its own), 5 (the band's) and five others that compile nothing; 1 is special to torch."""
    mine, reference = mlp(), mlp()
    step = compiled(mine, lr=1e-2, dynamic=True, max_shapes=3)
    data = [batches(1, size)[0] for size in (8, 5, 3, 12, 7, 100, 8, 1, 5)]
    losses = [step(*batch) for batch in data]
    expected = torch_loop(reference, data, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)
    assert len(step.programs) == 3


class Patches(nn.Module):
    """Aspect-ratio buckets: a convolution, attention over height × width, and a position code computed from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24, bias=False)  # a key's has no gradient
        self.out = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        h = h + torch.arange(h.shape[1], device=x.device)[:, None] / h.shape[1]
        q, k, v = self.qkv(h).chunk(3, -1)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v))
        return out


def test_aspect_ratios_are_one_band() -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean()

    torch.manual_seed(0)
    mine, reference = Patches(), Patches()
    reference.load_state_dict(mine.state_dict())
    step = compiled(mine, loss, lr=1e-2, dynamic=True, capture="read")
    sizes = [(8, 8), (4, 16), (16, 4), (6, 10), (12, 6), (10, 6), (8, 8)]
    data = [(torch.randn(2, 3, h, w),) for h, w in sizes]
    losses = [step(*batch) for batch in data]
    expected = torch_loop(reference, data, loss, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # fp32 sums
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)
    assert len(step.programs) == 2


def test_where_torch_fixes_a_size_each_shape_is_a_program_and_it_is_said() -> None:
    mine, reference = mlp(), mlp()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        weight = 2.0 if x.shape[0] == 5 else 1.0  # decides by the size: a program for each outcome
        return weight * F.mse_loss(m(x), y)

    step = compiled(mine, loss, lr=1e-2, dynamic=True)
    data = [batches(1, size)[0] for size in (8, 5, 3, 5, 8)]
    with pytest.warns(UserWarning, match=r"no one program serves these sizes, .* at .*test_shapes\.py:\d+: "):
        losses = [step(*batch) for batch in data]
    expected = torch_loop(reference, data, loss, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


def test_a_change_around_the_step_is_still_refused() -> None:
    """What a band's program served once it serves again, or it says what has changed."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 2))
    step = compiled(model, dynamic=True)
    for size in (8, 5, 3):
        step(*batches(1, size)[0])
    model[1].eval()
    with pytest.raises(RuntimeError, match=r"model.1.training was True .* is False now"):
        step(*batches(1, 3)[0])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="max_shapes=0 is not a number of batch shapes"):
        fc.compile_training_step(mlp(), lambda m, x: m(x).mean(), optimizer="adamw", max_shapes=0)
    with pytest.raises(TypeError, match="dynamic='yes' is a str"):
        fc.compile_training_step(mlp(), lambda m, x: m(x).mean(), optimizer="adamw", dynamic="yes")  # type: ignore[arg-type]


# -- captured by running -----------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """Dynamo cannot read it: a tensor with a gradient in an attribute."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.kept = torch.zeros(())
        self.register_buffer("position", torch.linspace(0, 1, 40)[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position[: x.shape[1]]
        self.kept = h.square().mean()
        out: Tensor = self.out(F.scaled_dot_product_attention(h, h, h)).mean(1)
        return out


def _run_both(
    make: Any, sizes: list[tuple[int, ...]], loss: Any = None, /, **options: Any
) -> tuple[fc.TrainingStep, list[str]]:
    """One step for each shape, compared with the ordinary loop's, captured by running; what was warned of."""
    torch.manual_seed(0)
    mine, reference = make(), make()
    reference.load_state_dict(mine.state_dict())
    data = [(torch.randn(*size, 4), torch.randn(size[0], 2)) for size in sizes]
    loss = loss or (lambda m, x, y: F.mse_loss(m(x), y))
    step = compiled(mine, loss, lr=1e-2, capture="run", dynamic=True, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = [step(*batch) for batch in data]
    expected = torch_loop(reference, data, loss, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # fp32 sums
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)
    return step, [str(warning.message) for warning in said]


def test_a_step_that_is_captured_by_running_serves_a_band() -> None:
    """(8, 5) has a program of its own, (6, 7) opens the band; a size of 1 is special to torch."""
    sizes: list[tuple[int, ...]] = [(8, 5), (6, 7), (3, 9), (12, 2), (8, 5), (1, 4), (2, 40), (6, 7)]
    step, said = _run_both(Sequences, sizes, max_shapes=3)
    assert len(step.programs) == 3 and not any("no one program" in one or "serves no band" in one for one in said)


def test_a_branch_on_a_size_is_an_assumption_of_a_run() -> None:
    """Lengths over 16 take another branch: their sizes are a second band's."""

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (2.0 if x.shape[1] > 16 else 1.0) * F.mse_loss(m(x), y)

    step, _ = _run_both(Sequences, [(4, 5), (4, 7), (4, 20), (4, 6), (4, 30), (4, 16), (4, 17)], loss)
    assert len(step.programs) == 3


def by_loop(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(m(x[:, : i + 1]), y) for i in range(x.shape[1])]).mean()


def by_text(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return {"3": 2.0, "5": 3.0}.get(f"{x.shape[1]}", 1.0) * F.mse_loss(m(x), y)


def by_key(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return {3: 2.0, 5: 3.0}.get(x.shape[1], 1.0) * F.mse_loss(m(x), y)


@pytest.mark.parametrize("loss", [by_loop, by_text, by_key])
def test_what_needs_the_number_of_a_size_has_a_program_for_each(loss: Any) -> None:
    step, said = _run_both(Sequences, [(4, 5), (4, 3), (4, 2), (4, 5), (4, 3)], loss)
    told = [one for one in said if one.startswith("no one program serves these sizes")]
    assert len(step.programs) == 3 and len(told) == 1, said
    assert loss is by_key or ": return" in told[0]  # the line


class Counts(Sequences):
    """Counts the positions that it has seen, which another size would count otherwise."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[1]
        out: Tensor = super().forward(x)
        return out


def test_where_python_counts_by_a_size_each_shape_is_a_program_and_it_is_said() -> None:
    step, said = _run_both(Counts, [(4, 5), (4, 3), (4, 2), (4, 5)], max_shapes=3)
    assert step.model.seen == 15
    assert any("and the loss changes what Python keeps besides tensors. So each" in one for one in said), said


class Keeps(Sequences):
    """Keeps its batch's last size, which nothing reads before it is written."""

    size = 0

    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape[0]
        out: Tensor = super().forward(x) * self.size
        return out


def test_a_size_that_python_keeps_is_that_of_each_batch() -> None:
    """The third shape has the second's first size: only the run with symbols shows that it is kept."""
    step, _ = _run_both(Keeps, [(4, 5), (6, 5), (6, 7), (5, 7), (4, 5)])
    assert step.model.size == 4
