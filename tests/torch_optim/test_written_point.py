"""What is written into parameters that hold y counts as in ``schedulefree``, which keeps y and z: WGAN's clamp."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile._torch_optim.written_point import EVERY
from fusion_compile.optim._transform import Transform
from tests.small_models import assert_same_weights, batches, mlp
from tests.torch_loops import equal, made, train, weights


def sf(decay: float = 0.0) -> Transform:
    return optim.sf_adamw(lr=1e-2, weight_decay=decay)


def peer_of(model: nn.Module) -> tuple[nn.Module, Any]:
    reference = copy.deepcopy(model)
    official = schedulefree.AdamWScheduleFree(reference.parameters(), lr=1e-2, weight_decay=0.0)
    official.train()
    return reference, official


def clamp_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.1, 0.1)


def clamp_under_no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.1, 0.1)


def project(model: nn.Module) -> None:
    weight = model.get_parameter("0.weight")
    weight.data = weight.data / weight.data.norm(dim=1, keepdim=True)


def prune(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("2.weight")[0].zero_()


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "WGAN's clamp through .data": clamp_data,
    "a clamp under no_grad": clamp_under_no_grad,
    "a projection by rebinding": project,
    "pruned rows": prune,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_at_y_counts_as_in_schedulefree(write: str, backend: str) -> None:
    model = mlp()
    reference, official = peer_of(model)
    optimizer = made(model, sf(), mode=None if backend != "eager" else "eager", backend=backend)
    for m, o in ((model, optimizer), (reference, official)):
        train(m, o, batches(6), functools.partial(WRITES[write], m))
    optimizer.eval()
    official.eval()
    # Steps of 1e-2, each rounded otherwise by 2^-24 of a weight, and x found by a division by 1 - 0.9.
    assert_same_weights(model, reference, rtol=1e-4, atol=2e-6)


def initialize(model: nn.Module) -> None:
    nn.init.constant_(model.get_parameter("2.weight").data, 0.1)


def rescale(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(0.5)


def prune_data(model: nn.Module) -> None:
    model.get_parameter("0.weight").data[:4].zero_()


def add_in_numpy(model: nn.Module) -> None:
    array = model.get_parameter("2.bias").detach().numpy()
    array += 0.25


ONCE = {f.__name__: f for f in (initialize, rescale, prune_data, add_in_numpy)}


@pytest.mark.parametrize("when", [2, 4])
@pytest.mark.parametrize("write", ONCE)
def test_a_single_write_that_no_version_tells_counts(write: str, when: int) -> None:
    model = mlp()
    reference, official = peer_of(model)
    optimizer = made(model, sf(), mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m, o in ((model, optimizer), (reference, official)):
            train(m, o, batches(when))
            ONCE[write](m)
            train(m, o, batches(6)[when:])
    (group,) = optimizer._inside.groups()
    assert not group.written_point.seen  # one write does not make every step look
    optimizer.eval()
    official.eval()
    assert_same_weights(model, reference, rtol=1e-4, atol=2e-6)


def test_a_write_just_before_eval_counts() -> None:
    model = mlp()
    reference, official = peer_of(model)
    optimizer = made(model, sf())
    for m, o in ((model, optimizer), (reference, official)):
        train(m, o, batches(5))
        m.get_parameter("2.bias").data.fill_(0.5)
        o.eval()
    assert_same_weights(model, reference, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["sf_adamw", "sf_normuon", "full_fusion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_look_at_parameters_that_nobody_wrote_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    found = []
    for looks in (True, False):
        model = mlp().to(dtype)
        optimizer = made(model, name, force_spectral=[r"0\.weight"] if name != "sf_adamw" else [])
        for batch in batches(4, dtype=dtype):
            train(model, optimizer, [batch])
            (group,) = optimizer._inside.groups()
            group.written_point.seen = looks
            group.written_point.looked = 10**6
        found.append({**weights(model), **{k: t.clone() for k, t in group.state.items()}})
    assert equal(*found)


def test_a_late_write_of_a_few_entries_says_what_was_lost_and_the_next_ones_count() -> None:
    model = mlp()
    optimizer = made(model, sf())
    data = batches(1) * (EVERY + 4)
    train(model, optimizer, data[:3])
    weight = model.get_parameter("0.weight")
    (group,) = optimizer._inside.groups()
    group.written_point.note = lambda: None  # type: ignore[method-assign]  # as if no sample had these entries
    group.written_point._samples._noted.clear()
    weight.data.fill_(0.25)  # lost: the last look was before step 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, data[3:EVERY])
    with pytest.warns(UserWarning, match=rf"through \.data, .* those of the {EVERY - 1} steps before it, .* are lost"):
        train(model, optimizer, data[EVERY:], lambda: weight.data.fill_(0.25))
    x_before = optimizer.state[weight]["x"].clone()
    weight.data.fill_(0.75)
    train(model, optimizer, data[:1])
    assert float((optimizer.state[weight]["x"] - x_before).mean()) > 0.1


def test_where_x_does_not_follow_y_a_write_is_said_to_be_overwritten() -> None:
    base = optim.adamw(lr=1e-2)
    bent = Transform(
        base.init, base.update, base.extras._replace(gradient_point=lambda p, s, c: {k: t * t for k, t in p.items()})
    )
    model = mlp()
    optimizer = made(model, bent)
    train(model, optimizer, batches(2))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(7.0)
    with pytest.warns(UserWarning, match=r"0\.bias was written to while the parameters hold .* overwritten now"):
        train(model, optimizer, batches(1))
