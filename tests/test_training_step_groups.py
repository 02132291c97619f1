"""Parameter groups of a training step: numbers of their own, live, in every recipe, in checkpoints and explanations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from tests.data.bowl import Bowl, loss_fn, noise
from tests.refusals import refused
from tests.small_models import (
    PROGRAMS,
    assert_same_weights,
    batches,
    bits,
    compiled,
    differing,
    mlp,
    squared_error,
)

BIASES: dict[str, Any] = {"params": [r"bias$"], "weight_decay": 0.0, "lr": 3e-3, "name": "no_decay"}


def torch_loop(model: nn.Module, steps: int) -> None:
    """``torch.optim.AdamW`` with the groups of `BIASES`."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not n.endswith("bias")]},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    for batch in batches(steps):
        optimizer.zero_grad()
        squared_error(model, *batch).backward()
        optimizer.step()


def grouped_step(model: nn.Module, **options: Any) -> fc.TrainingStep:
    recipe = optim.adamw(lr=1e-2, weight_decay=0.1)
    return compiled(model, **{"optimizer": recipe, "groups": [BIASES], **options})


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*PROGRAMS.values(), {"backend": "inductor"}], ids=[*PROGRAMS, "inductor"])
def test_two_groups_are_those_of_torchs_adamw(options: dict[str, Any]) -> None:
    model, reference = mlp(), mlp()
    step = grouped_step(model, **options)
    for batch in batches(20):
        step(*batch)
    torch_loop(reference, 20)
    assert_same_weights(model, reference)
    assert len(step.programs) == (0 if options == {"mode": "eager"} else 1)


@pytest.mark.parametrize(
    ("name", "program"),
    [*((name, "eager") for name in optim.RECIPES), ("adamw", "captured"), ("sf_normuon", "captured")],
)
@pytest.mark.covering("adamw", "muon", "sf_adamw", "full_fusion")
def test_every_recipe_takes_the_steps_of_the_torch_optimizer_with_these_groups(name: str, program: str) -> None:
    options = PROGRAMS[program]
    transform = optim.RECIPES[name]()
    model = Bowl()
    own: dict[str, nn.Parameter] = {}
    rest: list[tuple[str, nn.Parameter]] = []
    for n, p in model.named_parameters():
        own |= {n: p} if n in ("square", "gain") else {}
        rest += [] if n in ("square", "gain") else [(n, p)]
    assert own and rest
    optimizer = optim.as_torch_optimizer(
        [{"params": rest}, {"params": list(own.items()), "lr": 5e-4}], transform, **options
    )
    group = {"params": [f"^{re.escape(n)}$" for n in own], "lr": 5e-4}
    step = fc.compile_training_step(Bowl(), loss_fn, optimizer=transform, groups=[group], **options)
    for i in range(5):
        optimizer.zero_grad()
        loss = loss_fn(model, *noise(i))
        loss.backward()
        optimizer.set_loss(loss)
        optimizer.step()
        step(*noise(i))
        at_y = step.gradient_point()
        assert all(torch.equal(p, at_y[n]) for n, p in model.named_parameters()), i


def test_a_group_that_repeats_the_defaults_changes_no_bit() -> None:
    plain, model = mlp(), mlp()
    one = compiled(plain)
    two = compiled(model, groups=[{"params": ["bias"], "lr": 1e-3}])
    for batch in batches(5):
        assert torch.equal(one(*batch), two(*batch))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_each_number_is_live_and_an_unlisted_one_follows_the_default() -> None:
    model = mlp()
    step = grouped_step(model)
    assert list(step.hyperparameters)[-3:] == ["no_decay.weight_decay", "no_decay.lr", "clip_grad_norm"]
    data = batches(4)
    step(*data[0])
    step.hyperparameters["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(*data[1])
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == {"0.weight", "2.weight"}
    step.hyperparameters["no_decay.lr"] = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(*data[2])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert float(step.metrics["no_decay.lr"]) == 0.0
    follows = compiled(mlp(), groups=[{"params": ["bias"], "weight_decay": 0.0}])
    assert "group0.lr" not in follows.hyperparameters
    follows.hyperparameters["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in follows.model.named_parameters()}
    follows(*data[0])
    assert all(torch.equal(p, before[n]) for n, p in follows.model.named_parameters())
    assert len(step.programs) == len(follows.programs) == 1
    with pytest.raises(KeyError, match="Group 'group0' has the numbers that it was given; list this one when"):
        follows.hyperparameters["group0.lr"] = 1.0


def test_a_number_of_a_group_may_be_a_schedule() -> None:
    model, by_hand = mlp(), mlp()
    scheduled = grouped_step(model, groups=[{**BIASES, "lr": optim.linear(1e-2, 8)}])
    written = grouped_step(by_hand)
    for i, batch in enumerate(batches(4)):
        written.hyperparameters["no_decay.lr"] = optim.linear(1e-2, 8)(i)
        scheduled(*batch)
        written(*batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_half_precision_accumulation_and_clipping_go_over_all_groups() -> None:
    model, plain = mlp(torch.bfloat16), mlp(torch.bfloat16)
    options: dict[str, Any] = {"accumulate": 2, "clip_grad_norm": 1e-3}
    grouped = compiled(model, groups=[{"params": ["bias"], "lr": 1e-3}], **options)
    whole = compiled(plain, **options)
    for batch in batches(3, dtype=torch.bfloat16):
        grouped(*batch)
        whole(*batch)
    # The norm adds two banks in place of one: another order of sums in fp32 (6e-8), in Adam divided by √v.
    torch.testing.assert_close(grouped.metrics["grad_norm"], whole.metrics["grad_norm"], rtol=1e-6, atol=0)
    masters = whole.state_dict()["optimizer"]
    for name, master in grouped.state_dict()["optimizer"].items():
        if name.startswith("master."):
            torch.testing.assert_close(master, masters[name], rtol=1e-5, atol=1e-7)
    assert "module/scalar/bfloat16@group0" in grouped._state


def test_what_a_recipe_pools_it_pools_over_a_group() -> None:
    """The clip inside the optimizer sees one group: each has the norm 1, and the bound is 1."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    sgd = optim.chain(optim.clip_by_global_norm(1.0), optim.scale_by_learning_rate(1.0))

    def loss(model: Two, scale: Tensor) -> Tensor:
        return (scale * (model.one + model.other)).sum()

    model = Two()
    step = fc.compile_training_step(model, loss, optimizer=sgd, groups=[{"params": ["other"], "lr": 1.0}], mode="eager")
    step(torch.ones(1))
    # 1 / (1 + 1e-6), as torch clips; over both parameters the norm would be √2 and the step 0.707
    torch.testing.assert_close(model.one, torch.tensor([-1.0]), rtol=0, atol=2e-6)
    torch.testing.assert_close(model.other, torch.tensor([-1.0]), rtol=0, atol=2e-6)


# -- checkpoints, diagnostics, explanations ----------------------------------------------------------------------------


def trained(groups: list[dict[str, Any]], steps: range, step: fc.TrainingStep | None = None) -> fc.TrainingStep:
    step = step or fc.compile_training_step(Bowl(), loss_fn, optimizer="sf_normuon", groups=groups, mode="eager")
    for i in steps:
        step(*noise(i))
    return step


GROUPS: list[dict[str, Any]] = [{"params": ["^gain$"], "weight_decay": 0.0, "name": "no_decay"}]


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path: Path) -> None:
    straight = trained(GROUPS, range(6))
    first = trained(GROUPS, range(3))
    first.hyperparameters["no_decay.weight_decay"] = 0.25
    first.save(tmp_path / "ck")
    resumed = trained(GROUPS, range(0))
    resumed.load(tmp_path / "ck")
    assert resumed.hyperparameters["no_decay.weight_decay"] == 0.25
    resumed.hyperparameters["no_decay.weight_decay"] = 0.0
    trained(GROUPS, range(3, 6), resumed)
    assert differing(bits(straight), bits(resumed)) == []
    names = resumed.state_dict()["optimizer"]
    assert any(n.startswith("no_decay.") and n.endswith(".gain") for n in names)
    assert any(n.startswith("default.") for n in names)


def test_another_grouping_is_refused_by_load_and_taken_by_warm_start() -> None:
    plain = trained([], range(3))
    step = trained(GROUPS, range(0))
    with refused(step, ValueError, "missing optimizer no_decay.", "model, recipe and groups that saved it"):
        step.load_state_dict(plain.state_dict())
    report = step.warm_start(plain.state_dict())
    assert report.fresh == report.unused == ()
    back = trained([], range(0))
    assert back.warm_start(step.state_dict()).fresh == ()
    saved = back.state_dict()["optimizer"]
    assert all(torch.equal(t, saved[n]) for n, t in plain.state_dict()["optimizer"].items())


def test_diagnostics_of_a_named_group_have_its_name() -> None:
    step = compiled(
        mlp(), optimizer=optim.scale_lr_by_loss_ratio(optim.adamw(), beta=0.0), groups=[{"params": ["bias"]}]
    )
    step(*batches(1)[0])
    found = {n for n in step.metrics if "gamma" in n}
    assert found == {"fusion/gamma_curr", "group0/fusion/gamma_curr"}


def test_explain_shows_each_parameters_group() -> None:
    step = grouped_step(mlp())
    step(*batches(1)[0])
    found = step.explain()
    assert isinstance(found, fc.Explanation)
    routing = next(s for s in found.sections if s.heading == "Routing")
    assert routing.columns == ("parameter", "how many", "shape", "role", "group", "why")
    assert {(row[0], row[4]) for row in routing.rows} == {
        ("0.weight", "default"),
        ("0.bias", "no_decay"),
        ("2.weight", "default"),
        ("2.bias", "no_decay"),
    }
    assert [r.group for r in step.routes] == ["default", "no_decay", "default", "no_decay"]


# -- no_decay ----------------------------------------------------------------------------------------------------------


def test_no_decay_is_a_group() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    step = compiled(model, groups=[fc.no_decay(model)])
    assert {r.name for r in step.routes if r.group == "no_decay"} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert step.hyperparameters["no_decay.weight_decay"] == 0.0
    step(*batches(1)[0])


def test_a_recipe_with_two_decays_names_the_one_that_counts() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"sets 'weight_decay', but muon does not read it.*scalar_weight_decay"):
        fc.compile_training_step(model, squared_error, optimizer="muon", groups=[fc.no_decay(model)], mode="eager")
    group = fc.no_decay(model, "scalar_weight_decay")
    step = fc.compile_training_step(model, squared_error, optimizer="muon", groups=[group], mode="eager")
    assert step.hyperparameters["no_decay.scalar_weight_decay"] == 0.0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ({"params": ["bias"]}, TypeError, r"groups is a dict; give a list of groups"),
        ([["bias"]], TypeError, r"groups\[0\] is a list; give a dictionary"),
        ([{"lr": 1.0}], ValueError, r"group 'group0' lacks 'params'"),
        ([{"params": []}], ValueError, r"group 'group0' has an empty list of params"),
        ([{"params": "bias"}], TypeError, r"params='bias' is a string; give a list"),
        ([{"params": [3]}], TypeError, r"lists a int in params; give regular expressions"),
        ([{"params": ["("]}], ValueError, r"'\(' is not a regular expression"),
        ([{"params": ["gain"]}], ValueError, r"group 'group0': 'gain' matches no trainable parameter; the names look"),
        ([{"params": ["bias"]}, {"params": ["0"]}], ValueError, r"0\.bias is in the groups 'group0' and 'group1'"),
        ([{"params": ["bias"], "wd": 0.0}], ValueError, r"sets 'wd', which adamw does not have; it has beta1"),
        ([{"params": ["bias"], "weight_dcay": 0.0}], ValueError, r"Did you mean 'weight_decay'"),
        ([{"params": ["bias"], "clip_grad_norm": 1.0}], ValueError, r"sets 'clip_grad_norm', which adamw does not"),
        ([{"params": ["bias"], "lr": "fast"}], TypeError, r"'group0\.lr' was given 'fast'"),
        ([{"params": ["bias"], "name": "a.b"}], ValueError, r"has the name 'a\.b'; give letters, digits"),
        ([{"params": ["bias"], "name": "default"}], ValueError, r"and not 'default'"),
        (
            [{"params": ["bias"], "name": "a"}, {"params": ["weight"], "name": "a"}],
            ValueError,
            r"groups\[1\] is called 'a', as a group before it",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused_and_the_model_is_as_before(
    groups: Any, error: type[Exception], words: str
) -> None:
    model = mlp()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(error, match=words):
        compiled(model, groups=groups)
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_a_rate_that_nothing_reads_is_refused() -> None:
    """A model whose matrices are all small has only scalar_lr under muon; lr changed nothing without a word."""
    with pytest.raises(ValueError, match=r"^the step sets 'lr', but muon does not read it .*scalar_lr"):
        fc.compile_training_step(mlp(), loss_fn, optimizer="muon", lr=1.0)
    step = fc.compile_training_step(mlp(), loss_fn, optimizer="muon", lr=1.0, force_spectral=[r"^0\.weight$"])
    assert step.hyperparameters["lr"] == 1.0
