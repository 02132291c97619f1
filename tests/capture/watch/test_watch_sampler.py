"""A sampler's watch sees at the next call every change that a trace has frozen, and nothing else."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.watch.scope import SAMPLER
from fusion_compile._capture.watch.watch import Watch


def watch_of(model: nn.Module) -> Watch:
    return Watch({"": model}, scope=SAMPLER)


def watched() -> tuple[Any, Watch]:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaling, self.merged, self.processor = {"a": 0.5}, ["x"], Processor()
            self.off, self.inner, self.table = False, nn.Linear(2, 2), torch.ones(2)

        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, "boost", 1.0)  # as FreeU's factors in diffusers' UNet

    class Processor:
        def __init__(self) -> None:
            self.heads = [1, 2]

    model = nn.Sequential(Adapter(), nn.Linear(2, 2)).eval()
    return model, watch_of(model)


STRUCTURE: dict[str, Callable[[Any], object]] = {
    "a scale": lambda m: m.scaling.update(a=0.25),
    "a second scale": lambda m: m.scaling.update(b=0.25),
    "a list": lambda m: m.merged.append("y"),
    "a switch": lambda m: setattr(m, "off", True),
    "a processor": lambda m: setattr(m, "processor", object()),
    "in a processor": lambda m: m.processor.heads.__setitem__(0, 5),
    "a child": lambda m: setattr(m, "inner", nn.Linear(2, 2)),
    "an attribute that the code can do without": lambda m: setattr(m, "boost", 2.0),
    "no child": lambda m: delattr(m, "inner"),
    "no bias": lambda m: setattr(m.inner, "bias", None),
    "training": lambda m: m.inner.train(),
    "forward of an instance": lambda m: setattr(m.inner, "forward", torch.relu),
    "a hook": lambda m: m.inner.register_forward_hook(print),
    "a hook that torch did not register": lambda m: m.inner._forward_pre_hooks.update(a=print),
    "a plain tensor": lambda m: setattr(m, "table", torch.ones(2)),
    "a tensor's dtype": lambda m: m.inner.double(),
    "a buffer": lambda m: m.inner.register_buffer("b", torch.ones(1)),
}


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
def test_what_is_seen(change: Callable[[Any], object]) -> None:
    model, watch = watched()
    assert watch.changed() is None
    change(model[0])
    found = watch.changed()
    assert found is not None and found.tensors is None and found.late == 0
    watch.remember()
    assert watch.changed() is None


def test_equal_values_and_new_attributes_pass() -> None:
    model, watch = watched()
    model[0].scaling["a"] = float("0.5")
    model[0].new = object()
    copy.deepcopy(model)
    assert watch.changed() is None


def test_what_only_training_reads_passes() -> None:
    model, watch = watched()
    model[1].weight.register_hook(print)
    model.requires_grad_(False)
    model[1].register_full_backward_hook(print)
    model[1].weight.tag = 1
    with torch.no_grad(), torch.autocast("cpu"):
        assert all(watch.changed() is None for _ in range(watch.turns))


def test_a_weight_that_is_out_of_memory_is_no_change() -> None:
    model, watch = watched()
    model[1].weight.data = torch.empty(0)
    assert watch.changed() is None
    watch.remember()
    model[1].weight = nn.Parameter(torch.ones(2, 2))
    found = watch.changed()
    assert found is not None and found.tensors is not None and list(found.tensors) == ["1.weight"]


def test_replaced_weights_by_name() -> None:
    model, watch = watched()
    new = nn.Parameter(torch.ones(2, 2))
    model[1].weight = new
    found = watch.changed()
    assert found is not None and found.tensors is not None and list(found.tensors) == ["1.weight"]
    assert found.tensors["1.weight"] is new
    model[0].inner.bias.data = model[0].inner.bias.data.double()
    found = watch.changed()
    assert found is not None and found.tensors is None and found.label == "0.inner.bias.dtype"


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_were_tied_are_replaced_by_tied_ones(tied: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[1].weight = model[0].weight
    watch = watch_of(model)
    new = nn.Parameter(torch.ones(2, 2))
    model[0].weight = new
    model[1].weight = new if tied else nn.Parameter(torch.ones(2, 2))
    found = watch.changed()
    assert found is not None and (found.tensors is not None) is tied


def test_what_the_compiler_does_to_every_module_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile writes these when it first runs."""
    _, watch = watched()
    monkeypatch.setattr(nn.Module, "__init__", lambda self: None)
    monkeypatch.setattr(nn.Module, "__setstate__", lambda self, state: None)
    monkeypatch.setattr(nn.Module, "___needs_generation_tag_patch", object(), raising=False)
    assert all(watch.changed() is None for _ in range(watch.turns))


def test_what_the_model_did_to_itself_is_accepted() -> None:
    model, watch = watched()
    model[0].off = True
    watch.accept()
    assert watch.changed() is None
    model[0].off = False
    assert watch.changed() is not None


def test_a_new_attribute_of_a_class_that_no_trace_read_is_seen_in_turns_at_most() -> None:
    model, watch = watched()
    type(model[0]).shared = 1
    found = [change for _ in range(watch.turns) if (change := watch.changed()) is not None]
    assert found and found[0].label.endswith("Adapter.shared")


def test_looking_at_a_thousand_modules_takes_well_under_a_step() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)) for _ in range(250)])
    watch = watch_of(model)
    start = time.perf_counter()
    for _ in range(20):
        assert watch.changed() is None
    assert (time.perf_counter() - start) / 20 < 0.05  # about 0.3 ms; the bound is for a machine that does other things
