"""Half-precision parameters in every form, in a training step and in a torch optimizer: numbers, resumes, writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.half_precision import FORMS
from tests import resumed_elsewhere as elsewhere
from tests.small_models import batches, bits, compiled, differing, mlp, squared_error

DATA = batches(8, dtype=torch.bfloat16)
quiet = pytest.mark.filterwarnings("ignore:half_precision='round'")


def trained(half_precision: str, count: int = 6, **options: Any) -> fc.TrainingStep:
    options = {"lr": 1e-3, "half_precision": half_precision, **options}
    step = compiled(mlp(torch.bfloat16), squared_error, **options)
    for batch in DATA[:count]:
        step(*batch)
    return step


@pytest.mark.parametrize("half_precision", ["exact", "kahan", "stochastic"])
def test_captured_is_eager_bit_for_bit_and_no_generator_moves(half_precision: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    eager = trained(half_precision, mode="eager")
    captured = trained(half_precision)
    assert not differing(bits(eager), bits(captured))
    assert torch.equal(before, torch.get_rng_state())


def test_exact_is_master_bit_for_bit_where_no_rounding_is_a_tie() -> None:
    """One master in 65,536 lies in the middle, and is rounded otherwise; none of these does."""
    exact, master = trained("exact", mode="eager"), trained("master", mode="eager")
    assert all(torch.equal(exact.gradient_point()[n], p) for n, p in master.gradient_point().items())
    assert all(torch.equal(a, b) for a, b in zip(exact.model.parameters(), master.model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["sf_adamw", "sf_normuon"])
def test_schedule_free_with_weights_without_a_master(optimizer: str) -> None:
    exact = trained("exact", mode="eager", optimizer=optimizer)
    master = trained("master", mode="eager", optimizer=optimizer)
    assert all(torch.equal(exact.gradient_point()[n], p) for n, p in master.gradient_point().items())


@quiet
@pytest.mark.parametrize("half_precision", FORMS)
def test_a_skipped_step_changes_no_bit(half_precision: str) -> None:
    step = trained(half_precision, mode="eager")
    before = bits(step)
    x, y = DATA[0]
    step(x * float("nan"), y)
    assert [n for n in differing(before, bits(step)) if not n.startswith("counts/")] == ["steps_called"]


def test_rounding_at_random_does_not_depend_on_the_layout() -> None:
    one = trained("stochastic", mode="eager", optimizer=optim.lion(1e-3), lr=None)
    groups = [{"params": ["bias"], "lr": 1e-3}]
    other = trained("stochastic", mode="eager", optimizer=optim.lion(1e-3), lr=None, groups=groups)
    assert len(one.layout.banks) != len(other.layout.banks)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_weight_that_is_written_between_steps_is_what_was_written() -> None:
    for half_precision in ("exact", "kahan", "stochastic", "master"):
        step = trained(half_precision, mode="eager")
        with torch.no_grad():
            step.model.get_parameter("0.weight").fill_(0.5)
        step.hyperparameters["lr"] = 0.0
        step(*DATA[6])
        assert bool((step.gradient_point()["0.weight"] == 0.5).all()), half_precision


@pytest.mark.parametrize("half_precision", ["exact", "kahan", "stochastic"])
def test_a_torch_optimizer_does_what_the_step_does(half_precision: str) -> None:
    torch.manual_seed(0)
    step = trained(half_precision, mode="eager")
    torch.manual_seed(0)
    model = mlp(torch.bfloat16)
    optimizer = optim.AdamW(model, lr=1e-3, half_precision=half_precision, mode="eager")
    for x, y in DATA[:6]:
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), model.parameters(), strict=True))
    first = model.get_parameter("0.weight")
    kept = optimizer.state[first]
    assert {"exact": "mantissa", "kahan": "compensation", "stochastic": "rounding.count"}[half_precision] in kept
    assert "master" not in kept

    frozen = first.detach().clone()
    optimizer.zero_grad()
    squared_error(model, *DATA[6]).backward()
    first.grad = None
    before = {part: t.clone() for part, t in kept.items() if t.ndim}
    optimizer.step()
    assert torch.equal(frozen, first)
    assert all(torch.equal(before[part], optimizer.state[first][part]) for part in before)


def test_a_resume_in_another_process_is_bitwise(tmp_path: Path) -> None:
    wanted = elsewhere.begin(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.resumed_elsewhere", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt")
    for name, sections in wanted.items():
        for section, tensors in sections.items():
            for key, tensor in tensors.items():
                parts = tensor if isinstance(tensor, dict) else {"": tensor}
                others = found[name][section][key]
                others = others if isinstance(others, dict) else {"": others}
                assert parts.keys() == others.keys()
                same = [torch.equal(parts[p], others[p]) and parts[p].dtype == others[p].dtype for p in parts]
                assert all(same), (name, section, key)


def test_refusals_leave_the_model_alone() -> None:
    model = mlp(torch.float16)
    at = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"half_precision='stochastic', and 0.weight is torch.float16"):
        compiled(model, half_precision="stochastic")
    with pytest.raises(ValueError, match="half_precision='none' is not known"):
        compiled(model, half_precision="none")
    with pytest.raises(ValueError, match="half_precision='none' is not known"):
        optim.AdamW(model, half_precision="none")
    assert at == [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"missing optimizer mantissa"):
        trained("exact", mode="eager").load_state_dict(trained("kahan", mode="eager").state_dict())


def test_schedule_free_in_a_torch_optimizer_says_that_it_needs_a_master() -> None:
    model = mlp(torch.bfloat16)
    optimizer = optim.SFAdamW(model, half_precision="exact", mode="eager")
    squared_error(model, *DATA[0]).backward()
    with pytest.raises(ValueError, match="its weights lie in an fp32 bank of their own"):
        optimizer.step()
