"""Stored fields in a training step and in a torch optimizer: captured, resumed, skipped, partly without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import Transform
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import bits, compiled, differing, squared_error

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "adamw int8": lambda: optim.adamw(1e-2, momentum="int8", second_moment="int8"),
    "lion 4bit": lambda: optim.lion(1e-3, momentum="4bit"),
    "sf_normuon int8 and bf16": lambda: optim.stored(
        optim.sf_normuon(1e-2, matmul_dtype=torch.float32), mu="int8", z="bf16"
    ),
    "soap 4bit": lambda: optim.stored(optim.soap(1e-2, every=2), mu="4bit", nu="int8_companded", left="bf16"),
}


def model(seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 130), nn.Tanh(), nn.Linear(130, 131), nn.Tanh(), nn.Linear(131, 3)).to(dtype)


def data(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, 5, generator=source).to(dtype), torch.randn(4, 3, generator=source).to(dtype))
        for _ in range(count)
    ]


def run(name: str, dtype: torch.dtype, **options: Any) -> fc.TrainingStep:
    step = compiled(model(dtype=dtype), squared_error, optimizer=TRANSFORMS[name](), **options)
    for batch in data(4, dtype):
        step(*batch)
    return step


SLOW = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sf_normuon int8 and bf16", "soap 4bit")]


@pytest.mark.parametrize("name", ["adamw int8", "lion 4bit", *SLOW])
def test_captured_is_eager_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    one = run(name, torch.bfloat16, mode="eager")
    torch.manual_seed(0)
    other = run(name, torch.bfloat16)
    assert not differing(bits(one), bits(other)) and len(other.programs) == 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_checkpoint_has_codes_by_parameter_and_resumes_bitwise(name: str, tmp_path: Path) -> None:
    step = run(name, torch.bfloat16, mode="eager")
    step.save(tmp_path)
    resumed = compiled(model(7, torch.bfloat16), squared_error, optimizer=TRANSFORMS[name](), mode="eager")
    resumed.load(tmp_path)
    assert not differing(bits(step), bits(resumed))
    for batch in data(7, torch.bfloat16)[4:]:
        step(*batch), resumed(*batch)
    assert not differing(bits(step), bits(resumed))
    kept = {n: t for n, t in step.state_dict()["optimizer"].items() if "mu" in n and n.endswith("2.weight")}
    codec = "4bit" if "4bit" in name else "int8"
    assert {n.split(".")[-3] for n in kept} == {f"mu_{codec}", f"mu_{codec}_scale"}


def test_a_checkpoint_of_another_codec_is_refused_and_warm_start_converts_it() -> None:
    step = run("lion 4bit", torch.float32, mode="eager")
    other = compiled(model(), squared_error, optimizer=optim.lion(1e-3, momentum="int8"), mode="eager")
    before = bits(other)
    with pytest.raises(ValueError, match=r"keeps mu as 4bit \(here: int8\)"):
        other.load_state_dict(step.state_dict())
    assert not differing(before, bits(other))
    said = str(other.warm_start(step.state_dict()))
    assert said == "carried mu; fresh: nothing; not used: nothing"


def test_a_step_that_is_skipped_changes_nothing_and_one_bad_entry_stays() -> None:
    step = run("adamw int8", torch.float32, mode="eager")
    before = bits(step)
    x, y = data(1)[0]
    step(x * float("nan"), y)
    after = bits(step)
    changed = [n for n in differing(before, after) if "count" not in n]
    assert changed == ["steps_called"] and int(step.metrics["skipped"]) == 1


def test_explain_shows_bytes_by_field_and_codec() -> None:
    report = fc.explain(run("adamw int8", torch.float32, mode="eager"))
    rows = next(s for s in report.sections if s.heading == "State by field").rows
    kept = {row[0]: (row[1], float(row[3])) for row in rows}
    assert kept["mu_int8"][0] == "int8" and kept["nu_int8_companded_scale"][0] == "float32"
    assert 1 <= kept["mu_int8"][1] < 1.2 and kept["weights"][0] == "float32"  # padding to blocks of 512


def facade(name: str, of: nn.Module) -> TorchOptimizer:
    return optim.as_torch_optimizer(of, TRANSFORMS[name], mode="eager")


def loop(of: nn.Module, optimizer: torch.optim.Optimizer, some: list[Any]) -> None:
    for x, y in some:
        optimizer.zero_grad()
        squared_error(of, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_torch_optimizer_steps_the_same_and_resumes_bitwise(name: str) -> None:
    torch.manual_seed(0)
    net = model(dtype=torch.bfloat16)
    optimizer = facade(name, net)
    loop(net, optimizer, data(3, torch.bfloat16))
    optimizer.eval()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    optimizer.train()
    loop(net, optimizer, data(5, torch.bfloat16)[3:])

    again = model(9, torch.bfloat16)
    other = facade(name, again)
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    other.eval()
    other.train()
    loop(again, other, data(5, torch.bfloat16)[3:])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    optimizer.eval()
    other.eval()
    one, two = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert all(torch.equal(one[i][part], two[i][part]) for i in one for part in one[i])


@pytest.mark.parametrize("name", ["adamw int8", "lion 4bit"])
def test_a_parameter_without_a_gradient_keeps_what_is_remembered_of_it(name: str) -> None:
    net = model()
    optimizer = facade(name, net)
    loop(net, optimizer, data(2))
    last = net[4].weight  # type: ignore[index]
    before = {part: t.clone() for part, t in optimizer.state[last].items()}
    optimizer.zero_grad()
    squared_error(net, *data(1)[0]).backward()
    last.grad = None
    weight = last.detach().clone()
    optimizer.step()
    assert torch.equal(last, weight)
    kept = {part: t for part, t in optimizer.state[last].items() if t.ndim}
    assert kept and all(torch.equal(before[part], t) for part, t in kept.items())


def test_groups_keep_codes_of_their_own() -> None:
    groups = [{"params": [r"\.bias$"], "lr": 1e-3, "name": "biases"}]
    step = compiled(model(), squared_error, optimizer=TRANSFORMS["adamw int8"](), groups=groups, mode="eager")
    for batch in data(2):
        step(*batch)
    assert any(n.startswith("biases.") and "mu_int8_scale.4.bias" in n for n in step.state_dict()["optimizer"])


def test_warm_start_carries_codes_with_their_scales_and_counts_with_their_moments() -> None:
    """A fresh second moment beside an old power of β₂ would take a step that is 30 times too long."""
    step = run("adamw int8", torch.float32, mode="eager")
    same = compiled(model(), squared_error, optimizer=TRANSFORMS["adamw int8"](), mode="eager")
    assert "fresh: nothing" in str(same.warm_start(step.state_dict()))
    other = compiled(model(), squared_error, optimizer=optim.adamw(1e-2, momentum="int8"), mode="eager")
    said = other.warm_start(step.state_dict())
    assert not said.fresh and {n.partition(".")[0] for n in said.carried} >= {"mu_int8", "nu", "beta2_power"}
    power = "base.0.beta2_power"
    assert torch.equal(other.state_dict()["optimizer"][power], step.state_dict()["optimizer"][power])
    bare = compiled(model(), squared_error, optimizer=optim.adamw(1e-2), mode="eager")
    saved = step.state_dict()
    saved["optimizer"] = {n: t for n, t in saved["optimizer"].items() if ".nu." not in n}
    said = bare.warm_start(saved)
    assert not said.carried and float(bare.state_dict()["optimizer"]["0.beta2_power"]) == 1.0
