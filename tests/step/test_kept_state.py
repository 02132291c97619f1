"""State that user code keeps in Python goes through a checkpoint: a resumed run is the run that never stopped."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop


class Centred(nn.Module):
    """Keeps a running mean in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Remembers(nn.Module):
    """Keeps what it saw last in a list, which is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x + sum(self.memory) if self.memory else x
        self.memory = [x.detach().mean(0), x.detach().amax(0)]
        return y


class LateNoise(nn.Module):
    """Rounds from its fourth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x if self.calls < 4 else x + ((x * 4).round() / 4 - x).detach()


class WithTeacher:
    """A loss with a teacher whose batch norm goes on counting."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.teacher = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).requires_grad_(False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y) + F.mse_loss(model(x), self.teacher(x))


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


MADE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "an attribute": (Centred, lambda: plain),
    "a list that is empty at first": (Remembers, lambda: plain),
    "a number that decides": (LateNoise, lambda: plain),
    "a closed-over batch norm": (nn.Tanh, WithTeacher),
}


def made(name: str, mode: str) -> tuple[nn.Module, fc.TrainingStep]:
    torch.manual_seed(0)
    middle, loss = MADE[name]
    model = nn.Sequential(nn.Linear(4, 8), middle(), nn.Linear(8, 2))
    how: dict[str, Any] = {"mode": "eager"} if mode == "eager" else {"backend": mode}
    return model, fc.compile_training_step(model, loss(), optimizer="adamw", lr=1e-2, **how)


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MADE)
def test_a_resumed_run_is_the_run_that_never_stopped(name: str, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    data = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(6)]
    model, step = made(name, mode)
    for batch in data[:3]:
        step(*batch)
    step.save(tmp_path)
    wanted = [float(step(*batch)) for batch in data[3:]]
    other, resumed = made(name, mode)
    resumed.load(tmp_path)
    assert [float(resumed(*batch)) for batch in data[3:]] == wanted
    for (n, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), n


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
def test_a_checkpoint_of_another_loss_is_refused_whole() -> None:
    _, step = made("a closed-over batch norm", "aot_eager")
    step(torch.randn(6, 4), torch.randn(6, 2))
    model, other = made("an attribute", "aot_eager")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"the checkpoint has loss_fn\.teacher.*nothing was loaded"):
        other.load_state_dict(step.state_dict())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def keeping(keep: Callable[[Any, Tensor], Tensor], **attributes: Any) -> nn.Module:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vars(self).update(copy.deepcopy(attributes))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * keep(self, x.detach().mean(0))

    return nn.Sequential(nn.Linear(4, 8), Keeps(), nn.Linear(8, 2))


def late(part: Any, mean: Tensor) -> Tensor:
    part.mean = 0.5 * getattr(part, "mean", 0) + mean
    return part.mean


def by_name(part: Any, mean: Tensor) -> Tensor:
    for name in ("low.er", "upper"):
        part.kept[name] = 0.5 * part.kept[name] + mean if name in part.kept else mean
    return part.kept["low.er"] - 2 * part.kept["upper"]


def whole_dictionary(part: Any, mean: Tensor) -> Tensor:
    part.kept = {"a": mean if part.kept is None else 0.5 * part.kept["a"] + mean}
    return part.kept["a"]


def list_of_one(part: Any, mean: Tensor) -> Tensor:
    if part.kept:
        part.kept[0] = 0.5 * part.kept[0] + mean
    else:
        part.kept.append(mean)
    return part.kept[0]


def two_of_three(part: Any, mean: Tensor) -> Tensor:
    part.kept[0], part.kept[1] = 0.5 * part.kept[0] + mean, part.kept[0]
    return part.kept[1] * part.kept[2]


def last_two(part: Any, mean: Tensor) -> Tensor:
    part.kept.append(mean)
    return sum(part.kept, torch.zeros(8))


def first_batch(part: Any, mean: Tensor) -> Tensor:
    if not part.ready:
        part.start, part.ready = mean.clone(), True
    start: Tensor = part.start
    return start


def drawn_once(part: Any, mean: Tensor) -> Tensor:
    if part.start is None:
        part.start = torch.randn(8)
    return mean * part.start


KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "an attribute that is absent at first": (late, {}),
    "entries of a dictionary that is empty at first": (by_name, {"kept": {}}),
    "a dictionary that is None at first": (whole_dictionary, {"kept": None}),
    "the item of a list that is empty at first": (list_of_one, {"kept": []}),
    "two items of a list of three": (two_of_three, {"kept": [torch.zeros(8), torch.zeros(8), torch.ones(8)]}),
    "what the first batch sets": (first_batch, {"ready": False, "start": None}),
    "what is drawn once": (drawn_once, {"start": None}),
    "a full deque": (last_two, {"kept": collections.deque([torch.zeros(8)] * 2, maxlen=2)}),
}


@pytest.mark.parametrize("name", KEPT)
def test_state_is_found_again_in_a_model_that_has_not_run(name: str) -> None:
    keep, attributes = KEPT[name]
    data = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(5)]

    def step_of() -> fc.TrainingStep:
        torch.manual_seed(0)
        return fc.compile_training_step(keeping(keep, **attributes), plain, optimizer="adamw", lr=1e-2, mode="eager")

    step = step_of()
    for batch in data[:3]:
        step(*batch)
    saved = step.state_dict()
    assert saved["carried"]
    wanted = [float(step(*batch)) for batch in data[3:]]
    resumed = step_of()
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["carried"].keys() == saved["carried"].keys()
    assert [float(resumed(*batch)) for batch in data[3:]] == wanted


@pytest.mark.parametrize("name", ["an attribute", "a list that is empty at first", "a closed-over batch norm"])
def test_what_a_validation_changed_after_the_last_step_is_saved(name: str) -> None:
    torch.manual_seed(1)
    data = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(5)]
    model, step = made(name, "eager")
    for batch in data[:2]:
        step(*batch)
    with torch.no_grad():
        step._programs._loss_fn(model, *data[2])
    saved = step.state_dict()
    wanted = [float(step(*batch)) for batch in data[3:]]
    _, resumed = made(name, "eager")
    resumed.load_state_dict(saved)
    assert [float(resumed(*batch)) for batch in data[3:]] == wanted


@pytest.mark.parametrize("name", MADE)
def test_a_state_that_was_loaded_or_is_captured_again_is_saved_whole_before_a_step(name: str) -> None:
    torch.manual_seed(1)
    _, step = made(name, "eager")
    for _ in range(3):
        step(torch.randn(6, 4), torch.randn(6, 2))
    saved = step.state_dict()
    kept = {**saved["carried"], **saved["numbers"]}
    assert kept
    step.recapture()
    _, resumed = made(name, "eager")
    resumed.load_state_dict(saved)
    for again in (step.state_dict(), resumed.state_dict()):
        found = {**again["carried"], **again["numbers"]}
        assert found.keys() == kept.keys()
        assert all(torch.equal(torch.as_tensor(found[n]), torch.as_tensor(kept[n])) for n in kept)


@pytest.mark.filterwarnings("ignore:the step is captured by running it", "ignore:this step ran uncaptured")
def test_a_recurrent_net_that_carries_its_state_goes_on_after_the_second_look() -> None:
    class Carries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.hidden = nn.LSTM(4, 2), torch.zeros(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, (hidden, _) = self.net(x, (self.hidden, self.hidden))
            self.hidden = hidden.detach()
            return out

    step = fc.compile_training_step(Carries(), plain, optimizer="adamw", backend="aot_eager", capture="run")
    losses = [float(step(torch.ones(3, 4), torch.ones(3, 2))) for _ in range(4)]
    assert len(set(losses)) == 4


class Judge:
    """A loss by a frozen critic whose spectral norm holds, until its first forward, the weight itself."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        first = nn.utils.spectral_norm(nn.Linear(2, 8))
        self.critic = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 1)).requires_grad_(False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-self.critic(model(x))).mean()


class NoiseOfItsOwn:
    """A loss that draws from a generator that it keeps."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x + torch.randn(x.shape, generator=self.generator)), y)


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
@pytest.mark.parametrize("loss", [Judge, NoiseOfItsOwn])
def test_what_a_resumed_loss_holds_at_first_is_not_taken_for_its_state(loss: Any, tmp_path: Path) -> None:
    """A checkpoint wrote the critic's normalized weight into the weight that it is computed from, and left the loss's
    own generator where it stood. Tolerance: fp32's rounding over six steps of two programs."""
    data = batches(6)
    reference, resumed, whole, later = mlp(), mlp(), loss(), loss()
    wanted = torch_loop(reference, data, whole)
    step = compiled(mlp(), loss(), capture="run")
    found = [step(*batch) for batch in data[:3]]
    step.save(tmp_path / "ck")
    between = compiled(mlp(), loss(), mode="eager")  # which saves what it loaded, and takes no step
    between.load(tmp_path / "ck")
    between.save(tmp_path / "ck")
    step = compiled(resumed, later, mode="eager")
    step.load(tmp_path / "ck")
    found += [step(*batch) for batch in data[3:]]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert_same_weights(resumed, reference)
    if loss is Judge:
        assert torch.equal(later.critic[0].weight_orig, whole.critic[0].weight_orig)
    else:
        assert torch.equal(later.generator.get_state(), whole.generator.get_state())
