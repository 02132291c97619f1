"""The watch as a whole: what it says, forgets, excepts, and how late it may be."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._capture.python_state.attributes import attribute_slots
from fusion_compile._capture.python_state.slots import WHOLE, Slot
from fusion_compile._capture.watch.reads import Reads, reading
from fusion_compile._capture.watch.watch import Watch


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.calls = 0
        self.mean = torch.zeros(2)
        self.history: list[Any] = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.linear(x) - self.mean
        self.mean = 0.5 * self.mean + 0.5 * out.detach().mean(0)
        self.history[0] = self.calls
        return out


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def run(model: nn.Module) -> Reads:
    with reading() as reads:
        loss(model, torch.randn(3, 4), torch.randn(3, 2)).backward()
    return reads


def watch_of(model: nn.Module, **options: Any) -> Watch:
    return Watch({"model": model, "loss": loss}, run(model), **options)


def deep(layers: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)], nn.Linear(4, 2))


def dropout(part: nn.Module) -> nn.Dropout:
    assert isinstance(part, nn.Dropout)
    return part


def linear(part: nn.Module) -> nn.Linear:
    assert isinstance(part, nn.Linear)
    return part


def noticed(watch: Watch) -> list[str]:
    found = [watch.changed() for _ in range(watch.turns)]
    return [change.label for change in found if change is not None]


def test_a_change_is_told_until_it_is_remembered() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))
    watch = watch_of(model)
    dropout(model[1]).p = 0.2
    first, second = watch.changed(), watch.changed()
    assert first == second and first is not None
    assert (first.label, first.before, first.after, first.late, first.read) == ("model.1.p", 0.1, 0.2, 0, True)
    watch.remember()
    assert noticed(watch) == []


def test_what_is_put_back_is_no_change() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))
    watch = watch_of(model)
    before = dropout(model[1]).p
    dropout(model[1]).p = 0.2
    assert watch.changed() is not None
    dropout(model[1]).p = before
    assert noticed(watch) == []


def test_the_label_of_a_root_may_be_empty() -> None:
    model = deep(1)
    watch = Watch({"": model}, run(model))
    model[0].weight.requires_grad_(False)
    assert noticed(watch)[0] == "0.weight.requires_grad"


def test_slots_that_the_caller_writes_are_excepted() -> None:
    model = Counts()
    watch = watch_of(model)
    run(model)
    change = watch.changed()
    assert change is not None and change.label == "model.history[0]" and change.before == 1 and change.after == 2
    state = vars(model)
    watch.except_([Slot(state, "calls", ""), *attribute_slots(model, "mean", "model"), Slot(model.history, 0, "")])
    run(model)
    assert noticed(watch) == []
    model.history[1] = 5
    assert noticed(watch)[0] == "model.history[1]"
    watch.remember()
    model.history.append(3)
    assert noticed(watch)[0] == "model.history[2]"
    watch.except_([Slot(model.history, WHOLE, "")])
    model.history.append(4)
    assert noticed(watch) == []
    model.other = 1  # type: ignore[assignment]
    assert noticed(watch)[0] == "model.other"


def test_a_slot_that_is_excepted_may_appear() -> None:
    model = Counts()
    watch = watch_of(model)
    watch.except_([Slot(vars(model), "later", "")])
    model.later = 1  # type: ignore[assignment]
    assert noticed(watch) == []
    model.calls = 7
    assert noticed(watch)[0] == "model.calls"


def test_tensors_that_the_capture_does_not_hold_may_be_replaced_by_their_kind() -> None:
    model = Counts()
    watch = watch_of(model, frozen=[model.linear.weight])
    watch.except_([Slot(vars(model), "calls", ""), Slot(model.history, 0, "")])
    model.mean = torch.ones(2)
    model.linear.bias = nn.Parameter(torch.ones(2))
    assert noticed(watch) == []
    model.mean = torch.ones(3)
    change = watch.changed()
    assert change is not None and change.label == "model.mean" and change.kind == "tensor"
    model.mean = torch.ones(2)
    assert noticed(watch) == []
    model.linear.weight = nn.Parameter(torch.ones(2, 4))
    assert noticed(watch)[0] == "model.linear.weight"


def test_an_exchange_of_parameters_alone_names_the_new_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    watch = watch_of(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    change = watch.changed()
    assert change is not None and change.tensors is not None
    assert set(change.tensors) == {f"model.{name}" for name in model.state_dict()}
    assert change.tensors["model.0.weight"] is model[0].weight


@pytest.mark.parametrize("also", ["attribute", "other shape", "tie"])
def test_any_other_change_beside_it_names_none(also: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout(0.1))
    watch = watch_of(model)
    model[0].weight = nn.Parameter(torch.ones(4, 4))
    if also == "attribute":
        dropout(model[3]).p = 0.5
    elif also == "other shape":
        model[2].bias = nn.Parameter(torch.ones(3))
    else:
        model[1].weight = model[0].weight
    change = watch.changed()
    assert change is not None and change.tensors is None


def test_how_late_is_at_least_the_truth_and_less_than_a_round() -> None:
    """An unread attribute of each of many torch modules in turn."""
    model = deep(60)
    watch = watch_of(model)
    assert watch.turns > 8
    lates = []
    for i in range(0, 60, 7):
        linear(model[i]).in_features = 5
        change, calls = watch.changed(), 0
        while change is None:
            change, calls = watch.changed(), calls + 1
        assert change.label == f"model.{i}.in_features" and not change.read
        assert calls <= change.late < watch.turns
        lates.append(calls)
        watch.remember()
    assert max(lates) > 0


def test_what_was_read_is_never_late() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(40)], nn.Linear(4, 2))
    watch = watch_of(model)
    for i in range(0, 40, 9):
        model[i][1].p = 0.5  # type: ignore[index]
        change = watch.changed()
        assert change is not None and change.label == f"model.{i}.1.p" and change.late == 0
        watch.remember()


def test_a_hook_is_noticed_at_once_in_a_large_model_and_one_elsewhere_is_no_change() -> None:
    model = deep(60)
    watch = watch_of(model)
    nn.Tanh().register_forward_hook(lambda module, given, out: None)
    assert noticed(watch) == []
    model[50].register_forward_hook(lambda module, given, out: None)
    change = watch.changed()
    assert change is not None and change.label == "model.50's forward hook" and change.late == 0


def test_sets_and_hooks_stay_as_they_are_when_something_else_is_compared_by_value() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    model.get_parameter("0.weight").register_hook(lambda gradient: None)
    model[0].active = {1}  # type: ignore[assignment]
    watch = watch_of(model)
    for _ in range(3):
        dropout(model[1]).p = float("0.5")
        assert noticed(watch) == []


def test_a_hook_around_all_modules() -> None:
    model = deep(1)
    watch = watch_of(model)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, given: None)
    try:
        change = watch.changed()
        assert change is not None and change.label == "forward pre-hook of all modules"
    finally:
        handle.remove()


def test_settings_of_torch() -> None:
    watch = watch_of(deep(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        change = watch.changed()
    assert change is not None and change.kind == "setting"
    assert (change.label, change.before, change.after) == ("torch.is_autocast_enabled('cpu')", False, True)
    assert noticed(watch) == []
    torch.backends.cudnn.deterministic = True
    try:
        assert noticed(watch)[0] == "torch.backends.cudnn.deterministic"
    finally:
        torch.backends.cudnn.deterministic = False


def test_a_cache_that_is_given_up_for_a_new_one_is_no_change_unless_somebody_has_it() -> None:
    kept = types.SimpleNamespace(cache={}, other=None)

    def reads_cache(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() * len(kept.cache) * (1 if kept.other is None else 2)

    model = deep(1)

    def used() -> None:  # as a context manager does: filled inside of it, and new at its end
        kept.cache["weight"] = torch.ones(1)
        kept.cache = {}

    with reading() as reads:
        reads_cache(model, torch.ones(1, 4))
    watch = Watch({"model": model, "loss": reads_cache}, reads)
    for _ in range(3):
        used()
        assert noticed(watch) == []
    kept.cache = {"weight": 1}
    assert noticed(watch) != []
    kept.cache = {}
    kept.other = kept.cache
    watch.remember()
    used()
    assert noticed(watch) != []


def test_an_order_that_changes_at_each_call_is_no_change_and_costs_one_round_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recent = {"a": 1.0, "b": 2.0}

    def reads_recent(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() * recent["a"]

    model = deep(1)
    with reading() as reads:
        reads_recent(model, torch.ones(1, 4))
    watch = Watch({"model": model, "loss": reads_recent}, reads)
    rounds = []
    remember = watch.remember

    def counting() -> None:
        rounds.append(1)
        remember()

    monkeypatch.setattr(watch, "remember", counting)
    for _ in range(5):
        recent["a"] = recent.pop("a")
        assert watch.changed() is None
        recent["b"] = recent.pop("b")
        assert watch.changed() is None
    assert len(rounds) == 1
    recent["c"] = 3.0
    assert watch.changed() is not None


def test_without_reads_every_attribute_counts() -> None:
    settings = types.SimpleNamespace(weight=1.0)

    def weighted(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() * settings.weight

    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))
    watch = Watch({"model": model, "loss": weighted})
    assert noticed(watch) == []
    dropout(model[1]).p = 0.2
    assert noticed(watch)[0] == "model.1.p"
    watch.remember()
    settings.weight = 2.0
    assert noticed(watch)[0] == "settings.weight"


def test_every_part_can_be_measured_even_where_there_is_nothing_to_compare() -> None:
    for watch in (Watch({}), Watch({"model": nn.Linear(2, 2)})):
        for part in watch.parts().values():
            part()
        assert watch.changed() is None
