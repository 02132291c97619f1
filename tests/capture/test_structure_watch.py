"""A structure watch sees every change that a trace has frozen, and nothing else."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion_compile._capture.structure_watch import StructureWatch


def watched() -> tuple[nn.Module, StructureWatch]:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaling, self.merged, self.processor = {"a": 0.5}, ["x"], Processor()
            self.off, self.inner = False, nn.Linear(2, 2)

    class Processor:
        def __init__(self) -> None:
            self.heads = [1, 2]

    model = nn.Sequential(Adapter(), nn.Linear(2, 2)).eval()
    return model, StructureWatch(model)


STRUCTURE: dict[str, Callable[[nn.Module], object]] = {
    "a scale": lambda m: m.scaling.update(a=0.25),  # type: ignore[operator, union-attr]
    "a second scale": lambda m: m.scaling.update(b=0.25),  # type: ignore[operator, union-attr]
    "a list": lambda m: m.merged.append("y"),  # type: ignore[operator, union-attr]
    "a switch": lambda m: setattr(m, "off", True),
    "a processor": lambda m: setattr(m, "processor", object()),
    "in a processor": lambda m: m.processor.heads.__setitem__(0, 5),  # type: ignore[operator, union-attr]
    "a child": lambda m: setattr(m, "inner", nn.Linear(2, 2)),
    "no child": lambda m: delattr(m, "inner"),
    "no bias": lambda m: setattr(m.inner, "bias", None),
    "training": lambda m: m.inner.train(),  # type: ignore[union-attr]
    "a buffer": lambda m: m.inner.register_buffer("b", torch.ones(1)),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
def test_a_structure_watch_sees(change: Callable[[nn.Module], object]) -> None:
    model, watch = watched()
    assert watch.changed() is None
    change(model[0])  # type: ignore[index]
    found = watch.changed()
    assert found is not None and found.tensors is None
    watch.accept_current()
    assert watch.changed() is None


def test_a_structure_watch_lets_equal_values_and_new_attributes_pass() -> None:
    model, watch = watched()
    model[0].scaling["a"] = float("0.5")  # type: ignore[index]
    model[0].new = object()  # type: ignore[index]
    copy.deepcopy(model)
    assert watch.changed() is None


def test_looking_at_a_thousand_modules_takes_well_under_a_step() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)) for _ in range(250)])
    watch = StructureWatch(model)
    start = time.perf_counter()
    for _ in range(20):
        assert watch.changed() is None
    assert (time.perf_counter() - start) / 20 < 0.05  # about 0.3 ms; the bound is for a machine that does other things
