"""Checkpoints, copies and pickles of a torch optimizer."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.data.bowl import SHAPES, Bowl
from tests.small_models import batches, mlp
from tests.torch_loops import (
    SCHEDULE_FREE,
    bowl_steps,
    equal,
    made,
    train,
    trained_bowl,
    two_groups,
    weights,
)


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", optim.RECIPES)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(name: str, groups: bool) -> None:
    def begin(model: nn.Module) -> TorchOptimizer:
        named = list(model.named_parameters())
        params = [{"params": named[:2]}, {"params": named[2:], "lr": 5e-3}] if groups else named
        return made(params, name)

    def go_on(model: nn.Module, optimizer: TorchOptimizer, steps: range) -> None:
        optimizer.train()
        for i in steps:
            for rate in (n for n in optimizer.param_groups[-1] if n.endswith("lr")):
                optimizer.param_groups[-1][rate] *= 0.9
            bowl_steps(model, optimizer, range(i, i + 1))
        optimizer.eval()

    model = Bowl()
    optimizer = begin(model)
    go_on(model, optimizer, range(5))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(5, 9))

    fresh = Bowl(seed=3)
    fresh.load_state_dict(saved["model"])
    again = begin(fresh)
    again.load_state_dict(saved["optimizer"])
    assert [g["steps"] for g in again.param_groups] == [5] * len(again.param_groups)
    if name in SCHEDULE_FREE:
        assert not equal(weights(fresh), {n: saved["model"][n] for n in SHAPES}), "in train mode the model holds y"
    go_on(fresh, again, range(5, 9))
    assert equal(weights(fresh), weights(model))
    for a, b in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values(), strict=True):
        assert equal(a, b)


def test_loading_over_a_running_optimizer_recompiles_nothing() -> None:
    model = mlp()
    optimizer = as_torch_optimizer(model, optim.adamw(lr=1e-2), backend="aot_eager")
    train(model, optimizer, batches(2))
    at = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches(4)[2:])
    end = weights(model)
    model.load_state_dict(at[0])
    optimizer.load_state_dict(at[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, batches(4)[2:])
    assert equal(weights(model), end) and len(optimizer._inside.runs) == 1


def test_state_of_another_optimizer_is_refused_and_nothing_is_loaded() -> None:
    model = mlp()
    optimizer = made(model, "adamw")
    train(model, optimizer, batches(2))
    before = {i: {k: t.clone() for k, t in kept.items()} for i, kept in optimizer.state_dict()["state"].items()}
    other = mlp()
    theirs = made(other, "sf_adamw")
    train(other, theirs, batches(1))
    theirs.eval()
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  missing 0\.mu of 0\.weight"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups of \[2, 2\] parameters, this optimizer of \[4\]"):
        optimizer.load_state_dict(made(two_groups(mlp())).state_dict())
    with pytest.raises(ValueError, match="lacks param_groups"):
        optimizer.load_state_dict({"state": {}})
    changed = optimizer.state_dict()
    changed["state"][0] = {**changed["state"][0], "0.mu": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"mismatched 0\.mu of 0\.weight: \[3\] in the checkpoint, \[8, 4\] here"):
        optimizer.load_state_dict(changed)
    assert all(equal(kept, before[i]) for i, kept in optimizer.state_dict()["state"].items())


def test_a_parameter_that_the_checkpoint_lacks_starts_fresh_and_only_it() -> None:
    """Also where the state to load is the optimizer's own, live."""
    model, optimizer = trained_bowl("adamw")
    kept = {k: t.clone() for k, t in optimizer.state[model.tall].items()}
    saved = optimizer.state_dict()
    del saved["state"][list(SHAPES).index("bias")]
    optimizer.load_state_dict(saved)
    assert equal(optimizer.state[model.tall], kept)
    parts = optimizer.state[model.bias]
    assert not parts["0.mu"].any() and not parts["0.nu"].any() and float(parts["0.beta1_power"]) < 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "before the first step"])
@pytest.mark.parametrize("name", ["muon", "sf_normuon"])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name: str, how: str) -> None:
    model, optimizer = trained_bowl(name, 0 if how == "before the first step" else 4)
    pair = (model, optimizer)
    said: Any = contextlib.nullcontext()
    if how == "pickle" and name in SCHEDULE_FREE:
        said = pytest.warns(UserWarning, match="the model was pickled in train mode: the model's weights are Sch")
    with said:
        copied, again = copy.deepcopy(pair) if how != "pickle" else pickle.loads(pickle.dumps(pair))
    assert [id(p) for p in copied.parameters()] == [id(p) for p in again.param_groups[0]["params"]]
    start = weights(model)
    for m, o in ((copied, again), (model, optimizer)):
        assert equal(weights(m), start), "the other one moved"
        bowl_steps(m, o, range(4, 7))
    assert equal(weights(copied), weights(model)) and not equal(weights(model), start)


def test_a_transform_is_code_and_a_callable_that_makes_it_is_not() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"made of a Transform \(adamw\) cannot be pickled.*functools.partial"):
        pickle.dumps(made([p], optim.adamw()))
    again = pickle.loads(pickle.dumps(made([p], functools.partial(optim.adamw, lr=0.5, weight_decay=0.0))))
    q = again.param_groups[0]["params"][0]
    q.grad = torch.ones_like(q)
    again.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.5))
    assert "lr: 0.5" in repr(copy.deepcopy(made([p], optim.adamw(lr=0.5))))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sf_adamw"])
def test_dcps_state_dicts_resume_bitwise(name: str, flat: bool) -> None:
    """``set_state_dict`` loads the optimizer before the model."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, again = mlp(), mlp()
    optimizer, other = made(model, name), made(again, name)
    train(model, optimizer, batches(3))
    optimizer.eval()
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    for m, o in ((model, optimizer), (again, other)):
        o.train()
        train(m, o, batches(6)[3:])
        o.eval()
    assert equal(weights(again), weights(model))
