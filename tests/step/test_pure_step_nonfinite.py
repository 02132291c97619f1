"""No number that is not finite is written where a finite one stands, whatever it comes from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._step.pure_step import finite_entries
from fusion_compile._types import Tensors
from tests.small_models import PROGRAMS, batches, bits, compiled, differing, mlp

UNTAKEN = {"counts/skipped", "steps_called"}


def shifted(model: nn.Module, x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """The gradient does not depend on `shift`."""
    return F.mse_loss(model(x), y) + shift


def plus() -> optim.Transform:
    adam = optim.chain(optim.scale_by_adam((0.9, 0.95)), optim.scale_by_learning_rate(0.5))
    return optim.schedule_free_plus(adam, lr=0.5)


FROM_THE_LOSS = {"schedule_free_plus": plus, "loss ratio": lambda: optim.scale_lr_by_loss_ratio(optim.adamw(1e-3))}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", FROM_THE_LOSS)
def test_an_infinite_loss_with_a_finite_gradient_changes_no_bit(name: str, program: str) -> None:
    """The run goes on as though that batch had not been given."""
    step, reference = (compiled(mlp(), shifted, optimizer=FROM_THE_LOSS[name](), **PROGRAMS[program]) for _ in range(2))
    zero = torch.tensor(0.0)
    first, bad, *rest = batches(5)
    step(*first, zero)
    reference(*first, zero)
    for shift in (float("inf"), float("nan")):
        before = bits(step)
        step(*bad, torch.tensor(shift))
        assert torch.isfinite(step.metrics["grad_norm"])
        assert set(differing(before, bits(step))) == UNTAKEN
    for batch in rest:
        step(*batch, zero)
        reference(*batch, zero)
    assert set(differing(bits(reference), bits(step))) == UNTAKEN
    assert int(step.metrics["skipped"]) == 2 and float(step.metrics["update_norm"]) > 0


def test_an_infinite_loss_that_nothing_reads_is_a_step_as_in_the_ordinary_loop() -> None:
    step, reference = compiled(mlp(), shifted, mode="eager"), compiled(mlp(), shifted, mode="eager")
    (batch,) = batches(1)
    step(*batch, torch.tensor(float("inf")))
    reference(*batch, torch.tensor(0.0))
    assert differing(bits(reference), bits(step)) == [] and int(step.metrics["skipped"]) == 0
    assert torch.isinf(step.metrics["loss"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_update_of_0_by_0_leaves_its_entries_alone_and_is_counted(program: str) -> None:
    """Adam with eps = 0 divides 0 by 0 where a weight never had a gradient. Its neighbours step as in torch.optim."""

    def unread(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    x, y = batches(1)[0]
    x = x.clone()
    x[:, 2] = 0  # column 2 of the first layer has no gradient
    model, reference = mlp(), mlp()
    step = compiled(model, unread, optimizer=optim.adamw(1e-2, eps=0.0, weight_decay=0.0), **PROGRAMS[program])
    peer = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=0.0, weight_decay=0.0)
    untouched = model.get_parameter("0.weight").detach()[:, 2].clone()
    for count in (1, 2, 3):
        step(x, y)
        F.mse_loss(reference(x), y).backward()
        peer.step()
        peer.zero_grad()
        if count == 1:
            assert torch.isnan(reference.get_parameter("0.weight")[:, 2]).all()
        with torch.no_grad():  # what torch.optim has lost
            reference.get_parameter("0.weight")[:, 2] = untouched
        assert (int(step.metrics["skipped"]), int(step.metrics["step"])) == (count, count)
        assert torch.isnan(step.metrics["update_norm"])
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Both round each step otherwise, by some 2^-23.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(model.get_parameter("0.weight")[:, 2], untouched)


def explodes(value: float) -> optim.Transform:
    """Plain descent whose update and state become `value` in entry 0 of each bank, from the second step on."""

    def init(params: Tensors) -> dict[str, Tensors]:
        return {"sum": {k: torch.zeros_like(p) for k, p in params.items()}}

    def update(
        updates: Tensors, state: dict[str, Tensors], params: Tensors, context: optim.Context
    ) -> tuple[Tensors, dict[str, Tensors]]:
        after, moves = {}, {}
        for k, u in updates.items():
            at_zero = (torch.arange(u.numel()) == 0).view(u.shape)
            late = (state["sum"][k].abs().sum() > 0) & at_zero
            after[k] = torch.where(late, torch.full_like(u, value), state["sum"][k] + u.abs())
            moves[k] = torch.where(late, torch.full_like(u, value), -0.1 * u)
        return moves, {"sum": after}

    return optim.Transform(init, update, optim.Extras("explodes", descends=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("skip", [True, False])
def test_weights_and_state_stay_finite_entry_by_entry(value: float, skip: bool) -> None:
    step = compiled(mlp(), optimizer=explodes(value), skip_nonfinite=skip, mode="eager")
    first, *rest = batches(4)
    step(*first)
    kept = {k: t.flatten()[0].clone() for k, t in step._state.items() if k.partition("/")[0] in ("params", "optimizer")}
    for batch in rest:
        step(*batch)
    finite = all(bool(t.isfinite().all()) for k, t in step._state.items() if k in kept)
    assert finite == skip and int(step.metrics["skipped"]) == (3 if skip else 0)
    if skip:
        assert all(torch.equal(step._state[k].flatten()[0], t) for k, t in kept.items())


def test_a_buffer_and_a_state_may_hold_infinity() -> None:
    """A running minimum begins there; what was infinite before is nobody's mistake."""

    class Lowest(nn.Linear):
        lowest: Tensor

        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("lowest", torch.full((4,), float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            self.lowest = torch.minimum(self.lowest, x.detach().amin(0))
            return super().forward(x)

    def init(params: Tensors) -> dict[str, Tensor]:
        return {"best": torch.tensor(float("inf")), "seen": torch.tensor(0.0)}

    def update(
        updates: Tensors, state: dict[str, Tensor], params: Tensors, context: optim.Context
    ) -> tuple[Tensors, dict[str, Tensor]]:
        assert context.loss is not None
        seen = state["seen"] + 1
        best = torch.where(seen > 1, torch.minimum(state["best"], context.loss), state["best"])
        return {k: -0.1 * u for k, u in updates.items()}, {"best": best, "seen": seen}

    best = optim.Transform(init, update, optim.Extras("best", descends=True))
    step = compiled(nn.Sequential(Lowest()), optimizer=best, mode="eager")
    for batch in batches(3):
        step(*batch)
    assert (int(step.metrics["step"]), int(step.metrics["skipped"])) == (3, 0)
    assert torch.isfinite(step._state["optimizer/best"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_entries_are_finite_up_to_the_largest_number_of_the_dtype(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([0, largest, -largest, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    assert finite_entries(tensor).tolist() == torch.isfinite(tensor).tolist()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_of_float64_goes_on_after_a_step_that_is_nan(program: str) -> None:
    """The numbers that it shows are 0-dim tensors of float64, which torch guards as Python numbers that are not nan."""
    step, reference = (compiled(mlp().double(), shifted, **PROGRAMS[program]) for _ in range(2))
    zero = torch.zeros((), dtype=torch.float64)
    first, bad, *rest = batches(4, dtype=torch.float64)
    step(*first, zero)
    reference(*first, zero)
    step(bad[0], bad[1] * float("nan"), zero)
    step(*bad, zero * float("nan"))  # torch.float64 in the batch, too; the gradient is finite
    reference(*bad, zero)
    for batch in rest:
        step(*batch, zero)
        reference(*batch, zero)
    assert set(differing(bits(reference), bits(step))) == UNTAKEN and len(step.programs) <= 1


# ---------------------------------------------------------------------- periodic work after a skipped step


def scaled(model: nn.Module, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    return F.mse_loss(model(x), y) * factor


@pytest.mark.parametrize("recipe", ["full_fusion", "soap"])
def test_a_skipped_step_runs_no_periodic_work(recipe: str) -> None:
    """Step 11, which is skipped, is one after which these recipes renew their bases."""
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    step = compiled(mlp(), scaled, optimizer=recipe, force_spectral=[r"0\.weight"], mode="eager")
    (batch,) = batches(1)
    for _ in range(10):
        step(*batch, one)
    before = bits(step)
    step(*batch, nan)
    assert set(differing(before, bits(step))) == UNTAKEN


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_begins_with_a_skipped_step_is_the_run_without_it(program: str) -> None:
    """What is done once after the very first step is done after the first that is taken."""
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    step, reference = (
        compiled(mlp(), scaled, optimizer="full_fusion", force_spectral=[r"0\.weight"], **PROGRAMS[program])
        for _ in range(2)
    )
    (batch,) = batches(1)
    step(*batch, nan)
    for _ in range(3):
        step(*batch, one)
        reference(*batch, one)
    assert set(differing(bits(reference), bits(step))) == UNTAKEN


def test_a_loaded_step_does_not_begin_again() -> None:
    (batch,) = batches(1)
    one = torch.tensor(1.0)

    def made() -> fc.TrainingStep:
        return compiled(mlp(), scaled, optimizer="full_fusion", force_spectral=[r"0\.weight"], mode="eager")

    step, resumed = made(), made()
    step(*batch, one)
    resumed.load_state_dict(step.state_dict())
    for _ in range(2):
        step(*batch, one)
        resumed(*batch, one)
    assert differing(bits(step), bits(resumed)) == []
