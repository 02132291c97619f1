"""kaon's classes: the source's trajectories, by the source's own constructor arguments, and what its users do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusion_compile.optim import kaon
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import UPDATES, Bowl, loss_fn, noise, start_of, trace
from tests.data.families import FILE, FamilyCase
from tests.small_models import batches, mlp, squared_error

CASES = (
    *("kaon_adakaon_fp32_nogc", "kaon_adakaon_fp32", "kaon_adakaon_int8", "kaon_adakaon_beta1_0"),
    *("kaon_nekaon_fp32_nogc", "kaon_nekaon_fp32_k0", "kaon_adamuon_fp32_fp32ns", "kaon_lion_fp32_cautious"),
    *("kaon_lion_fp32_nocautious_nogc_wd", "kaon_adapnm_fp32"),
)
CLASSES: dict[str, Callable[..., TorchOptimizer]] = {
    **{"Adakaon": kaon.Adakaon, "Nekaon": kaon.Nekaon, "AdaMuon": kaon.AdaMuon, "Lion": kaon.Lion},
    **{"AdaPNM": kaon.AdaPNM, "KProdigy": kaon.KProdigy, "Autokaon": kaon.Autokaon},
}
EAGER: dict[str, Any] = {"mode": "eager"}


def from_meta(case: FamilyCase, params: Any) -> TorchOptimizer:
    """The class that the case names, with the constructor arguments that it names."""
    options = dict(case.meta["constructor"])
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if case.name.endswith("fp32ns"):
        options["matmul_dtype"] = torch.float32
    return CLASSES[case.meta["implementation"].rpartition(".")[2]](params, **options, **EAGER)


def follow(name: str, updates: tuple[int, ...]) -> None:
    """Within 3·floor + 2e-5 + 1e-7/‖displacement‖, the README's bound, at the weights and where gradients are taken."""
    case, model = FamilyCase(name), Bowl()
    start = start_of(model)
    optimizer = from_meta(case, model.parameters())
    for update in range(1, max(updates) + 1):
        optimizer.zero_grad()
        loss_fn(model, *noise(update - 1)).backward()
        optimizer.step()
        if update not in updates:
            continue
        for kind in case.kinds:
            optimizer.train(kind == "y")
            seen = trace({n: p.detach().clone() for n, p in model.named_parameters()}, start)
            optimizer.train()
            far = {n: ratio for n, ratio in case.ratios(update, kind, seen).items() if not ratio <= 1}
            assert not far, (update, kind, far)


@pytest.mark.parametrize("name", CASES)
def test_it_follows_the_source(name: str) -> None:
    follow(name, (1, 2, 5, 20))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_it_follows_the_source_to_the_end(name: str) -> None:
    follow(name, UPDATES)


def test_every_recorded_case_has_its_row() -> None:
    with np.load(FILE) as stored:
        recorded = set(json.loads(str(stored["__meta__"]))["cases"])
    elsewhere = {"kaon_kprodigy_fp32_nogc_full", "kempner_lion_wd", "kempner_sf_adamw", "kempner_muon"}
    assert recorded == {*CASES, *elsewhere, "torch_adafactor", "prodigy_slice11"}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32) -> None:
    for x, y in batches(3, dtype=dtype):
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_stay_pickles_go_on_and_transposed_weights_move(name: str) -> None:
    model = mlp()
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = CLASSES[name](model.parameters(), **EAGER)
    train(model, optimizer)
    for p in model.parameters():
        assert p.grad is not None
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(kept, model.parameters(), strict=True) if p.grad is not None)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.eval()
    again, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert type(other) is CLASSES[name]
    optimizer.train()
    other.train()
    train(model, optimizer)
    train(again, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_large_parameters_of_nekaon_keep_no_momentum_and_step_half_as_far() -> None:
    """Its trajectory for them is Adakaon's with β₁ = 0 and half of the rate."""
    model, reference = mlp(), mlp()
    optimizer = kaon.Nekaon(model.parameters(), low_vram_above=20, weight_decay=0.0, **EAGER)
    large = [p for p in reference.parameters() if p.numel() > 20]
    small = [p for p in reference.parameters() if p.numel() <= 20]
    assert large and small
    half = kaon.Adakaon(large, lr=5e-4, betas=(0.0, 0.999), **EAGER)
    rest = kaon.Nekaon(small, weight_decay=0.0, **EAGER)
    for x, y in batches(3):
        for loop, net in (((optimizer,), model), ((half, rest), reference)):
            for one in loop:
                one.zero_grad()
            squared_error(net, x, y).backward()
            for one in loop:
                one.step()
    optimizer.eval()
    rest.eval()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="low_vram_above was given parameter groups"):
        kaon.Nekaon([{"params": list(model.parameters())}], low_vram_above=60)


def test_the_program_of_four_adapters_is_that_of_forty() -> None:
    """One launch for all, and a compile whose time does not depend on their number: operators, not tensors."""

    def operators(pairs: int) -> list[str]:
        params = [nn.Parameter(torch.ones(shape)) for _ in range(pairs) for shape in ((4, 16), (16, 4))]
        optimizer = kaon.Adakaon(params, momentum_dtype="int8", backend="aot_eager")
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        (program,) = optimizer._inside.programs._programs.captured.values()
        return [str(node.target) for node in program.graph.graph.nodes if node.op != "placeholder"]

    assert operators(2) == operators(20) != []
