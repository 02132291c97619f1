"""Checkpoints: a resumed run is the run that never stopped, and what does not fit is refused whole."""

from __future__ import annotations

import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import assert_same_weights, batches, bits, compiled, differing, mlp, squared_error


class Noisy(nn.Module):
    """All that a resumed run could forget: dropout, statistics, and a buffer that no state dict holds."""

    drift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 2)
        )
        self.register_buffer("drift", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.drift = 0.9 * self.drift + 0.1 * x.detach().mean(0)
        return self.inside(x + self.drift)


def noisy_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, e = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
    return squared_error(model, (1 - t) * x + t * e, y)


def build(recipe: str, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> fc.TrainingStep:
    torch.manual_seed(seed)
    spectral = [r"inside\.3\.weight"] if recipe == "sf_normuon" else []
    model = Noisy().to(dtype)
    lr = fc.optim.cosine(1e-2, total_steps=12, warmup_steps=3)
    return compiled(model, noisy_error, optimizer=recipe, lr=lr, force_spectral=spectral, **options)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {"mode": "eager"}),
    "sf_normuon": ("sf_normuon", {"mode": "eager"}),
    "sf_adamw in bf16": ("sf_adamw", {"mode": "eager", "dtype": torch.bfloat16}),
    "sf_adamw, captured": ("sf_adamw", {}),
    "adamw, accumulating": ("adamw", {"mode": "eager", "accumulate": 2}),
    "adamw by Inductor": ("adamw", {"backend": "inductor", "mode": "default"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(run: str, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, statistics, dropout and the noise drawn on the device."""
    recipe, options = RUNS[run]
    data = batches(9, dtype=options.get("dtype", torch.float32))
    whole = build(recipe, 0, **options)
    for i, batch in enumerate(data):
        if i == 4:
            whole.save(tmp_path)  # in the middle, and the run goes on
        if i == 6:
            whole.hyperparameters["weight_decay"] = 0.3
        whole(*batch)

    resumed = build(recipe, 1, **options)
    if run != "adamw":  # into a step that was never called, and into one that has trained on something else
        resumed(*data[0])
    resumed.load(tmp_path)
    for i, batch in enumerate(data[4:], start=4):
        if i == 6:
            resumed.hyperparameters["weight_decay"] = 0.3
        resumed(*batch)
    assert differing(bits(whole), bits(resumed)) == []
    assert torch.equal(whole.metrics["loss"], resumed.metrics["loss"])


def test_hyperparameters_and_schedules_come_back(tmp_path: Path) -> None:
    step = compiled(mlp(), lr=fc.optim.linear(1e-2, 20), clip_grad_norm=None, mode="eager")
    for batch in batches(3):
        step(*batch)
    step.hyperparameters.update(weight_decay=0.25, beta1=0.5)
    step.save(tmp_path)

    fresh = compiled(mlp(), mode="eager", lr=1.0, clip_grad_norm=3.0)
    fresh.load(tmp_path)
    assert dict(fresh.hyperparameters) == dict(step.hyperparameters)
    assert fresh.hyperparameters["lr"] == fc.optim.linear(1e-2, 20)
    assert fresh.hyperparameters["clip_grad_norm"] == float("inf")
    fresh(*batches(1)[0])
    assert float(fresh.metrics["lr"]) == pytest.approx(fc.optim.linear(1e-2, 20)(3))
    assert float(fresh.metrics["weight_decay"]) == 0.25 and int(fresh.metrics["step"]) == 4


def test_a_schedule_of_the_users_own_stays_the_one_that_is_set(tmp_path: Path) -> None:
    step = compiled(mlp(), lr=lambda taken: 1e-3 / (1 + taken), mode="eager")
    step(*batches(1)[0])
    step.save(tmp_path)
    fresh = compiled(mlp(), lr=lambda taken: 5e-3 / (1 + taken), mode="eager")
    fresh.load(tmp_path)
    fresh(*batches(1)[0])
    assert float(fresh.metrics["lr"]) == pytest.approx(5e-3 / 2)


@pytest.mark.parametrize("recipe", ["adamw", "sf_adamw", "sf_normuon"])
def test_a_checkpoint_loads_into_another_layout_of_the_same_names(recipe: str, tmp_path: Path) -> None:
    """The same modules registered in another order lie elsewhere in the banks."""

    class Ordered(nn.Module):
        enter: nn.Linear
        left: nn.Linear
        right: nn.Linear
        leave: nn.Linear

        def __init__(self, *names: str) -> None:
            super().__init__()
            shapes = {"enter": (4, 8), "left": (8, 8), "right": (8, 8), "leave": (8, 2)}
            for name in names:
                self.add_module(name, nn.Linear(*shapes[name]))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            return self.leave(torch.tanh(self.left(x)) + torch.sin(self.right(x)))

    spectral = ["left.weight", "right.weight"] if "muon" in recipe else []
    options: dict[str, Any] = {"optimizer": recipe, "force_spectral": spectral, "mode": "eager"}
    step = compiled(Ordered("enter", "left", "right", "leave"), **options)
    other = compiled(Ordered("leave", "right", "enter", "left"), **options)
    first, *rest = batches(6)
    step(*first)
    step.save(tmp_path)
    other.load(tmp_path)
    places = [{p.name: (b.key, p.at) for b in s.layout.banks for p in b.places} for s in (step, other)]
    assert places[0] != places[1] and places[0].keys() == places[1].keys()
    for batch in rest:
        step(*batch)
        other(*batch)
    # The two layouts add the same numbers in another order (norms, banks of matrices).
    for name, tensor in step.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_everything_is_keyed_by_the_parameters_names(tmp_path: Path) -> None:
    step = build("sf_normuon", 0, mode="eager")
    saved = step.state_dict()
    names = {n for n, _ in step.model.named_parameters()}
    assert saved["model"].keys() == step.model.state_dict().keys()
    per_parameter = {n.split(".inside.", 1)[1] for n in saved["optimizer"] if ".inside." in n}
    assert {f"inside.{n}" for n in per_parameter} == names
    assert not any("float32" in n or "/" in n for n in saved["optimizer"])  # no bank shows


def test_the_weights_file_is_the_deployable_model(tmp_path: Path) -> None:
    step = compiled(mlp(), optimizer="sf_adamw", mode="eager")
    for batch in batches(3):
        step(*batch)
    step.save(tmp_path)
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    fresh = mlp()
    fresh.load_state_dict(load_file(tmp_path / index["files"]["model"]))
    assert_same_weights(fresh, step.model, rtol=0, atol=0)
    assert not torch.equal(step.gradient_point()["0.weight"], fresh.get_parameter("0.weight"))


def test_tied_weights_are_saved_under_both_names_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return squared_error(model, x, torch.cat([y, y], 1))

    step, other = compiled(tied(), loss, mode="eager"), compiled(tied(), loss, mode="eager")
    step(*batches(1)[0])
    step.save(tmp_path)
    other.load(tmp_path)
    assert differing(bits(step), bits(other)) == []
    assert other.model.get_parameter("2.weight") is other.model.get_parameter("0.weight")


def test_a_state_dict_is_a_copy() -> None:
    step = compiled(mlp(), mode="eager")
    saved = step.state_dict()
    kept = {n: t.clone() for part in ("model", "optimizer", "counts") for n, t in saved[part].items()}
    step(*batches(1)[0])
    assert all(torch.equal(t, kept[n]) for part in ("model", "optimizer", "counts") for n, t in saved[part].items())


# ---------------------------------------------------------------------- checkpoints that do not fit


def _refused(step: fc.TrainingStep, load: Callable[[], object], error: type[Exception], *words: str) -> None:
    """`load` raises `error` with all `words`, no bit and no random number changes, and the step trains on."""
    before, rng = bits(step), torch.get_rng_state()
    with pytest.raises(error) as caught:
        load()
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert differing(before, bits(step)) == [] and torch.equal(torch.get_rng_state(), rng)
    step(*batches(1)[0])
    assert differing(before, bits(step)) != []


def test_a_checkpoint_of_another_model_lists_what_differs_and_loads_nothing(tmp_path: Path) -> None:
    other = nn.Sequential(OrderedDict({"0": nn.Linear(4, 6), "1": nn.Tanh(), "last": nn.Linear(6, 2)}))
    compiled(other, mode="eager").save(tmp_path)
    step = compiled(mlp(), mode="eager")
    _refused(
        step,
        lambda: step.load(tmp_path),
        ValueError,
        "is of another model or optimizer; nothing was loaded",
        "missing model 2.weight",
        "unexpected model last.bias",
        "mismatched model 0.weight: [6, 4] in the checkpoint, [8, 4] here",
        "missing optimizer 0.mu.2.bias",
    )


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    compiled(mlp(), optimizer="sf_adamw", mode="eager").save(tmp_path)
    step = compiled(mlp(), mode="eager")
    _refused(
        step,
        lambda: step.load(tmp_path),
        ValueError,
        "missing optimizer 0.mu.0.weight",
        "unexpected optimizer z.0.weight",
    )


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    compiled(nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))), mode="eager").save(tmp_path)
    step = compiled(mlp(), mode="eager")
    _refused(step, lambda: step.load(tmp_path), ValueError, "… and ", " more")


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "nothing": (lambda s: s.clear(), ValueError, "it lacks model, optimizer, counts, hyperparameters, steps_called"),
    "no numbers at all": (lambda s: s.pop("hyperparameters"), ValueError, "it lacks hyperparameters"),
    "no number of ours": (
        lambda s: s.update(hyperparameters={"gamma": 1.0}),
        ValueError,
        "has none of the hyperparameters ",
    ),
    "a buffer": (lambda s: s["buffers"].update(gone=torch.zeros(3)), ValueError, "unexpected buffers gone"),
    "a strange schedule": (
        lambda s: s["hyperparameters"].update(lr={"schedule": "triangle"}),
        ValueError,
        "the schedule 'triangle', which this version",
    ),
    "nan for a number": (lambda s: s["hyperparameters"].update(weight_decay=math.nan), ValueError, "given nan"),
    "nan in a schedule": (
        lambda s: s["hyperparameters"].update(weight_decay={"schedule": "constant", "value": math.nan}),
        ValueError,
        "weight_decay' (whose schedule",
    ),
    "a count that is a word": (lambda s: s.update(steps_called="x"), ValueError, "steps_called is 'x', no number"),
    "a negative count": (lambda s: s.update(steps_called=-1), ValueError, "steps_called is -1, no number of calls"),
    "a count that is a switch": (lambda s: s.update(steps_called=True), ValueError, "steps_called is True"),
    "a negative tally": (
        lambda s: s["counts"].update(skipped=torch.tensor(-2)),
        ValueError,
        "the count 'skipped' is -2",
    ),
    "a short random state": (lambda s: s["rng"].update(cpu=s["rng"]["cpu"][:-1]), ValueError, "rng cpu [5055]"),
    "no section": (lambda s: s.update(counts=None), TypeError, "'counts' of the state is a NoneType"),
    "numbers that are a list": (lambda s: s.update(hyperparameters=[1]), TypeError, "'hyperparameters' of the state"),
    "a list for a tensor": (
        lambda s: s["model"].update({"2.bias": [0.0, 0.0]}),
        TypeError,
        "model 2.bias is a list, not a tensor",
    ),
    "whole numbers": (
        lambda s: s["model"].update({"2.bias": torch.ones(2, dtype=torch.int64)}),
        ValueError,
        "mismatched model 2.bias: torch.int64 in the checkpoint, torch.float32 here",
    ),
    "complex numbers": (
        lambda s: s["optimizer"].update({"0.mu.2.bias": torch.ones(2, dtype=torch.complex64)}),
        ValueError,
        "mismatched optimizer 0.mu.2.bias: torch.complex64",
    ),
    "numbers of nobody": (
        lambda s: s.update(numbers={"elsewhere.calls": 3}),
        ValueError,
        "the checkpoint has elsewhere.calls, which is not found",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_state_dict_loads_nothing(how: str) -> None:
    """Weights, moments, counts, numbers and random state: no bit of any."""
    spoil, error, words = SPOILED[how]
    step = compiled(mlp(), mode="eager")
    step(*batches(1)[0])
    saved = step.state_dict()
    spoil(saved)
    step(*batches(1)[0])
    _refused(step, lambda: step.load_state_dict(saved), error, words)


def test_numbers_that_only_one_side_has_are_said(tmp_path: Path) -> None:
    grouped = compiled(mlp(), groups=[{"params": ["bias"], "weight_decay": 0.5, "name": "biases"}], mode="eager")
    saved = grouped.state_dict()
    saved["hyperparameters"]["gamma"] = 2.0
    del saved["hyperparameters"]["biases.weight_decay"]
    with pytest.warns(UserWarning) as said:
        grouped.load_state_dict(saved)
    assert [str(w.message) for w in said] == [
        "the checkpoint lacks the hyperparameters biases.weight_decay: they stay what they are.",
        "the checkpoint has the hyperparameters gamma, which this step does not have: they count for nothing.",
    ]
    assert grouped.hyperparameters["biases.weight_decay"] == 0.5


@pytest.mark.parametrize("saved", [None, [], "folder"])
def test_what_is_no_state_dict_is_refused(saved: Any) -> None:
    step = compiled(mlp(), mode="eager")
    _refused(step, lambda: step.load_state_dict(saved), TypeError, f"the state is a {type(saved).__name__}")


def test_a_model_whose_state_dict_gives_copies_is_saved_and_not_loaded_into() -> None:
    """What is copied into a copy is lost without a word."""
    step = compiled(mlp(), mode="eager")
    step.model.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({n: t.clone() for n, t in state.items()})
    )
    saved = step.state_dict()
    _refused(step, lambda: step.load_state_dict(saved), ValueError, "0.weight [8, 4] of the model's", "is a copy")


def test_extra_state_is_put_back_by_the_module_itself(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self) -> Tensor:
            return torch.tensor(self.seen)

        def set_extra_state(self, state: Tensor) -> None:
            self.seen = int(state)

    step, fresh = (compiled(nn.Sequential(Counting(4, 2)), mode="eager") for _ in range(2))
    step.model[0].seen = 5  # type: ignore[index]
    step.save(tmp_path)
    fresh.load(tmp_path)
    assert fresh.model[0].seen == 5  # type: ignore[index]


def test_weights_that_a_sampler_released_are_not_saved_over_a_good_checkpoint(tmp_path: Path) -> None:
    """Released weights are empty tensors in the module, as after anything that rebinds parameters."""
    step = compiled(mlp(), mode="eager")
    step.save(tmp_path)
    step.model.get_parameter("0.weight").data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"0\.weight \[8, 4\] was rebound"):
        step.save(tmp_path)
    with pytest.raises(RuntimeError, match=r"0\.weight \[8, 4\] was rebound"):
        step.load(tmp_path)
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert_same_weights(fresh.model, mlp(), rtol=0, atol=0)


def test_a_released_step_does_not_save_over_a_good_checkpoint(tmp_path: Path) -> None:
    step = compiled(mlp(), mode="eager")
    step(*batches(1)[0])
    step.save(tmp_path)
    weights = {n: t.clone() for n, t in step.model.state_dict().items()}
    step.release()
    for use in (lambda: step.save(tmp_path), lambda: step.load(tmp_path), step.state_dict):
        with pytest.raises(RuntimeError, match="this training step was released"):
            use()
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert all(torch.equal(t, weights[n]) for n, t in fresh.model.state_dict().items())


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (
        shutil.rmtree,
        FileNotFoundError,
        "holds no checkpoint.json",
    ),
    "an empty folder": (
        _empty,
        FileNotFoundError,
        "give the folder that TrainingStep",
    ),
    "half an index": (lambda f: _truncate(f / "checkpoint.json"), ValueError, "is damaged: checkpoint.json is no JSON"),
    "an index of nothing": (lambda f: (f / "checkpoint.json").write_text("{}"), ValueError, "because it has no format"),
    "an index that is a list": (
        lambda f: (f / "checkpoint.json").write_text("[]"),
        ValueError,
        "because it has no format",
    ),
    "another format": (
        lambda f: (f / "checkpoint.json").write_text('{"format": 99}'),
        ValueError,
        "has format 99; this version reads formats 1 and 2",
    ),
    "half the weights": (lambda f: _truncate(next(f.glob("model-*"))), ValueError, "is no safetensors file"),
    "half the state": (lambda f: _truncate(next(f.glob("state-*"))), ValueError, "is no safetensors file"),
    "no weights": (lambda f: next(f.glob("model-*")).unlink(), ValueError, "a file that its index names is missing"),
    "noise for state": (
        lambda f: next(f.glob("state-*")).write_bytes(b"x" * 99),
        ValueError,
        "is no safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_missing_or_garbled_checkpoint_is_a_sentence(damage: str, tmp_path: Path) -> None:
    spoil, error, words = DAMAGES[damage]
    step = compiled(mlp(), mode="eager")
    step.save(tmp_path / "ck")
    spoil(tmp_path / "ck")
    _refused(step, lambda: step.load(tmp_path / "ck"), error, str(tmp_path / "ck"), words)


def test_a_model_whose_state_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class WithExtra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    step = compiled(nn.Sequential(WithExtra(4, 2)), mode="eager")
    with pytest.raises(ValueError, match=r"0._extra_state .* is a dict; a checkpoint holds tensors"):
        step.save(tmp_path / "ck")
    assert not (tmp_path / "ck").exists()


def test_safetensors_is_what_is_written(tmp_path: Path) -> None:
    """Readable without this package, names and all."""
    step = build("adamw", 0, mode="eager")
    step(*batches(1)[0])
    step.save(tmp_path)
    state = safetensors.torch.load_file(next(tmp_path.glob("state-*")))
    assert {"optimizer/0.mu.inside.0.weight", "counts/skipped", "rng/cpu", "buffers/drift"} <= state.keys()
    assert state["optimizer/0.mu.inside.0.weight"].shape == (8, 4)
