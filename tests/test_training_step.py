"""The training step against the ordinary torch loop, and its laws: skip, accumulation, dtypes, live numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import (
    PROGRAMS,
    assert_same_weights,
    batches,
    bits,
    compiled,
    differing,
    mlp,
    squared_error,
    torch_loop,
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_adamw_is_the_ordinary_loop(program: str) -> None:
    model, reference = mlp(), mlp()
    step = compiled(model, optimizer=fc.optim.adamw(lr=1e-2, weight_decay=0.1), **PROGRAMS[program])
    losses = [step(*batch) for batch in batches(20)]
    expected = torch_loop(reference, batches(20), lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert_same_weights(model, reference)


def test_a_step_under_no_grad_still_trains() -> None:
    """As in a library's evaluation loop that calls back."""
    model, reference = mlp(), mlp()
    step = compiled(model)
    with torch.no_grad():
        for batch in batches(3):
            step(*batch)
    torch_loop(reference, batches(3))
    assert_same_weights(model, reference)


# ---------------------------------------------------------------------- metrics


def test_metrics_are_torchs_numbers() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(x)
        return F.mse_loss(out, y), {"largest": out.abs().amax(), "per output": out.mean(0)}

    model = mlp()
    step = compiled(model, loss, lr=fc.optim.constant(1e-2, warmup_steps=4), clip_grad_norm=0.5, mode="eager")
    for taken, (x, y) in enumerate(batches(5)):
        before = copy.deepcopy(model)
        value = step(x, y)
        metrics = step.metrics

        out = before(x)
        F.mse_loss(out, y).backward()
        norm = torch.nn.utils.clip_grad_norm_(before.parameters(), 0.5)
        moved = [p - q for p, q in zip(model.parameters(), before.parameters(), strict=True)]
        torch.testing.assert_close(metrics["grad_norm"], norm)  # before clipping, as torch reports it
        # The displacement is that of rounded weights: each of about 60 is off by half a rounding of a number near 1.
        torch.testing.assert_close(
            metrics["update_norm"], torch.cat([m.flatten() for m in moved]).norm(), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(metrics["largest"], out.abs().amax())
        torch.testing.assert_close(metrics["per output"], out.mean(0))
        assert torch.equal(metrics["loss"], value) and value.ndim == 0 and not value.requires_grad
        assert float(metrics["lr"]) == pytest.approx(1e-2 * min(1.0, (taken + 1) / 4))
        assert (int(metrics["step"]), int(metrics["skipped"])) == (taken + 1, 0)
        assert float(metrics["clip_grad_norm"]) == 0.5 and float(metrics["weight_decay"]) == pytest.approx(0.01)


@pytest.mark.parametrize("program", PROGRAMS)
def test_losses_and_metrics_that_were_kept_do_not_change_later(program: str) -> None:
    step = compiled(mlp(), **PROGRAMS[program])
    first, *rest = batches(4)
    loss, metrics = step(*first), step.metrics
    kept = {n: t.clone() for n, t in metrics.items()} | {"value": loss.clone()}
    step.hyperparameters["lr"] = 0.5
    for batch in rest:
        step(*batch)
    assert all(torch.equal(t, kept[n]) for n, t in {**metrics, "value": loss}.items())
    assert not torch.equal(step.metrics["loss"], loss)


# ---------------------------------------------------------------------- live numbers


def test_a_number_set_between_steps_counts_from_the_next_step_without_a_new_program() -> None:
    model, reference = mlp(), mlp()
    step = compiled(model, clip_grad_norm=1.0)
    optimizer = torch.optim.AdamW(reference.parameters())
    for i, (x, y) in enumerate(batches(12)):
        lr, decay, bound = 1e-3 * (i + 1), 0.01 * i, 0.1 + 0.05 * i
        step.hyperparameters.update(lr=lr, weight_decay=decay, clip_grad_norm=bound)
        step(x, y)

        optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), bound)
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        optimizer.step()
    assert len(step.programs) == 1
    assert_same_weights(model, reference)


@pytest.mark.parametrize(
    "schedule", [fc.optim.cosine(1e-2, 10, 3), fc.optim.linear(1e-2, 10), lambda step: 1e-2 / (step + 1)]
)
def test_a_schedule_is_followed_step_by_step(schedule: fc.optim.Schedule) -> None:
    model, reference = mlp(), mlp()
    step = compiled(model, lr=schedule, mode="eager")
    optimizer = torch.optim.AdamW(reference.parameters())
    for i, (x, y) in enumerate(batches(12)):
        step(x, y)
        assert float(step.metrics["lr"]) == pytest.approx(schedule(i), rel=1e-6)
        optimizer.zero_grad()
        F.mse_loss(reference(x), y).backward()
        optimizer.param_groups[0]["lr"] = schedule(i)
        optimizer.step()
    assert_same_weights(model, reference)


# ---------------------------------------------------------------------- steps that are skipped


class WithBuffers(nn.Module):
    """Batch norm, dropout and a buffer that no state dict holds: all that a skipped step must not touch."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.inside(x)


BAD = {"nan": float("nan"), "infinite": float("inf"), "overflowing": 1e38}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sf_normuon"])
def test_a_nonfinite_gradient_changes_no_bit_and_is_counted(bad: str, accumulate: int, optimizer: str) -> None:
    """With accumulation one bad entry in the last micro-batch is enough."""
    step = compiled(
        WithBuffers(), optimizer=optimizer, accumulate=accumulate, force_spectral=SPECTRAL[optimizer], mode="eager"
    )
    good, (x, y), *later = batches(4)
    step(*good)
    before = bits(step)
    y = y.clone()
    y[-1, -1] = BAD[bad]
    for count in (1, 2):
        step(x, y)
        assert int(step.metrics["skipped"]) == count
        assert not torch.isfinite(step.metrics["grad_norm"])
        assert set(differing(before, bits(step))) == {"counts/skipped", "steps_called"}
    for batch in later:
        step(*batch)
    assert int(step.metrics["skipped"]) == 2 and int(step.metrics["step"]) == 1 + len(later)
    assert all(torch.isfinite(p).all() for p in step.model.parameters())
    assert any(n.startswith("optimizer/") for n in differing(before, bits(step)))


SPECTRAL = {"adamw": (), "sf_normuon": (r"inside\.[03]\.weight",)}


def test_a_captured_step_skips_too_and_with_low_precision_weights() -> None:
    step = compiled(mlp(torch.bfloat16), optimizer="sf_normuon", force_spectral=[r"0\.weight"])
    (x, y), other, *_ = batches(2, dtype=torch.bfloat16)
    step(x, y)
    before = bits(step)
    step(x, y * float("nan"))
    assert set(differing(before, bits(step))) == {"counts/skipped", "steps_called"}
    step(*other)
    assert {"module/0.weight", "optimizer/master.0.weight"} <= set(differing(before, bits(step)))


def test_without_skip_nonfinite_it_goes_through() -> None:
    step = compiled(mlp(), skip_nonfinite=False, mode="eager")
    x, y = batches(1)[0]
    step(x, y * float("nan"))
    assert int(step.metrics["skipped"]) == 0 and int(step.metrics["step"]) == 1
    assert all(torch.isnan(p).all() for p in step.model.parameters())


# ---------------------------------------------------------------------- accumulation and dtypes


@pytest.mark.parametrize("program", PROGRAMS)
def test_four_micro_batches_are_one_big_batch(program: str) -> None:
    model, reference = mlp(), mlp()
    seen: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return squared_error(model, x, y), {"mean": x.mean(), "loss again": squared_error(model, x, y)}

    step = compiled(model, loss, accumulate=4, **PROGRAMS[program])
    whole = compiled(reference, loss, mode="eager")
    for batch in batches(10):
        seen += [step(*batch) - whole(*batch)]
        for name in ("mean", "loss again", "grad_norm", "update_norm"):
            torch.testing.assert_close(step.metrics[name], whole.metrics[name], rtol=1e-5, atol=1e-6)
    assert float(torch.stack(seen).abs().max()) < 1e-6
    assert_same_weights(model, reference)


def test_micro_batches_split_every_tensor_with_a_leading_dimension_and_share_the_others() -> None:
    def loss(model: nn.Module, batch: dict[str, Any], scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return scale * squared_error(model, batch["x"], batch["y"]), {"size": torch.tensor(float(len(batch["x"])))}

    model, reference = mlp(), mlp()
    step = compiled(model, loss, accumulate=2, mode="eager")
    x, y = batches(1)[0]
    step({"x": x, "y": y}, torch.tensor(0.5))
    assert float(step.metrics["size"]) == 4
    torch_loop(reference, [(x, y)], lambda m, x, y: 0.5 * squared_error(m, x, y))
    assert_same_weights(model, reference)


def flow_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, e = torch.rand(len(x), device=x.device), torch.randn_like(x)
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y).float(), e - x)


def test_a_dit_computes_in_bf16_and_keeps_its_state_in_fp32() -> None:
    model = DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, mlp_ratio=2.0)
    inside: set[torch.dtype] = set()
    product = next(module for module in model.blocks[0].modules() if isinstance(module, nn.Linear))
    product.register_forward_hook(lambda module, args, out: inside.add(out.dtype))
    step = compiled(model, flow_loss, compute_dtype=torch.bfloat16)
    x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 10, (8,))
    losses = [float(step(x, y)) for _ in range(6)]
    assert len(step.programs) == 1 and inside == {torch.bfloat16}
    assert all(0 < loss < 10 for loss in losses)
    saved = step.state_dict()
    assert {t.dtype for part in ("model", "optimizer") for t in saved[part].values()} == {torch.float32}
    assert not any(torch.equal(p.bfloat16().float(), p) for p in model.parameters())  # no state was rounded to bf16


def test_bf16_compute_follows_fp32_to_bf16s_precision() -> None:
    model, reference = mlp(), mlp()
    half, full = compiled(model, compute_dtype=torch.bfloat16, mode="eager"), compiled(reference, mode="eager")
    for x, y in batches(10):
        assert float(half(x, y)) == pytest.approx(float(full(x, y)), rel=2e-2)  # bf16 keeps 8 bits
        # 2 to the -8 for every entry's rounding, some of which add up.
        torch.testing.assert_close(half.metrics["grad_norm"], full.metrics["grad_norm"], rtol=2e-2, atol=0)


def test_bf16_parameters_have_an_fp32_master_and_hold_its_rounding() -> None:
    """Steps too small for bf16 add up, and the module always holds the nearest bf16."""
    model = mlp(torch.bfloat16)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = compiled(model, optimizer=fc.optim.adamw(lr=1e-5, weight_decay=0.0), mode="eager")
    for batch in batches(200, dtype=torch.bfloat16):
        step(*batch)
    masters = step.state_dict()["optimizer"]
    for name, p in model.named_parameters():
        master = masters[f"master.{name}"]
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(master.to(torch.bfloat16), p)
        assert not torch.equal(master, start[name].float())
    # One step of 1e-5 is less than half a bf16 spacing for entries over 0.005; without a master none would move.
    assert any((p != start[n])[start[n].abs() > 0.01].any() for n, p in model.named_parameters())


@pytest.mark.parametrize("program", PROGRAMS)
def test_float64_trains_in_float64(program: str) -> None:
    """Captured too: torch.compile loses plain writes to 0-dim float64 tensors, as the loss and the powers of beta."""
    model, reference = mlp(torch.float64), mlp(torch.float64)
    step = compiled(model, lr=1e-2, **PROGRAMS[program])
    losses = [step(*batch) for batch in batches(10, dtype=torch.float64)]
    expected = torch_loop(reference, batches(10, dtype=torch.float64), lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-12, atol=0)
    assert_same_weights(model, reference, rtol=1e-12, atol=1e-13)


def test_parameters_of_three_dtypes_train_together() -> None:
    """Each as it would alone, to the precision of its dtype; the state is as precise as the finest."""

    dtypes = [torch.float32, torch.float64, torch.bfloat16]

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(mlp(dtype) for dtype in dtypes)

    def loss(model: Mixed, x: Tensor, y: Tensor) -> Tensor:
        each = zip(model.parts, dtypes, strict=True)
        first, *rest = (squared_error(m, x.to(dtype), y.to(dtype)).double() for m, dtype in each)
        return sum(rest, first)

    model = Mixed()
    step = compiled(model, loss)
    for batch in batches(6):
        step(*batch)
    assert [part.get_parameter("0.weight").dtype for part in model.parts] == dtypes
    reference = mlp(torch.float64)
    torch_loop(reference, batches(6, dtype=torch.float64))
    # Half a rounding of a weight near 1 in each dtype, and what rounding does to Adam's first steps of lr = 1e-3.
    for part, atol in zip(model.parts, (1e-5, 1e-12, 8e-3), strict=True):
        assert_same_weights(part.double(), reference, rtol=0, atol=atol)


def test_batches_of_other_shapes_and_strides_are_programs_of_the_same_state() -> None:
    model, reference = mlp(), mlp()
    data = [*batches(2), *batches(2, size=3), (torch.randn(4, 8).t(), torch.randn(8, 2)), *batches(1)]
    step = compiled(model)
    for batch in data:
        step(*batch)
    torch_loop(reference, data)
    assert len(step.programs) == 3
    assert_same_weights(model, reference)


def test_inductor_gives_what_the_uncompiled_step_gives() -> None:
    model, reference = mlp(), mlp()
    step, plain = compiled(model, backend="inductor", mode="default"), compiled(reference, mode="eager")
    for batch in batches(8):
        torch.testing.assert_close(step(*batch), plain(*batch), rtol=1e-5, atol=1e-6)
    assert len(step.programs) == 1
    assert_same_weights(model, reference)
