"""What a model's code reads besides weights and arguments is followed: plain tensors, globals and closures."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

X, TIMES = torch.randn(2, 4), (0.9, 0.5, 0.1)
TABLE = torch.randn(4)
SCALE = 2.0
LEVELS = [1.0]
CONFIG = {"gain": 1.0}
STATE = types.SimpleNamespace(gain=1.0, bias=torch.randn(4))


def _shifted(early: Tensor) -> Tensor:
    return early * SCALE + LEVELS[0]


class Reads(nn.Module):
    """Each of the ways in which forward reads something that is neither a weight nor an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(1, 4)
        self.freqs, self.tables = torch.randn(4), {"rope": torch.randn(4)}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        early = self.b(t[:, None]) * self.freqs.sin() + self.tables["rope"].cos() + TABLE.sin()
        return self.a(x) * _shifted(early) * CONFIG["gain"] * STATE.gain + STATE.bias


def _set(name: str, value: Any) -> None:
    globals()[name] = value


CHANGES: dict[str, Callable[[Reads], object]] = {
    "a plain attribute, in place": lambda model: model.freqs.mul_(2),
    "a plain attribute, without a version": lambda model: model.freqs.data.mul_(2),
    "a plain attribute, another tensor": lambda model: setattr(model, "freqs", torch.randn(4)),
    "a tensor in a dictionary, in place": lambda model: model.tables["rope"].add_(1),
    "a tensor in a dictionary, another": lambda model: model.tables.update(rope=torch.randn(4)),
    "a global tensor, in place": lambda _: TABLE.add_(1),
    "a global tensor, another": lambda _: _set("TABLE", torch.randn(4)),
    "a global number, read in a function": lambda _: _set("SCALE", SCALE + 1),
    "a number in a global list": lambda _: LEVELS.__setitem__(0, LEVELS[0] + 1),
    "a number in a global dictionary": lambda _: CONFIG.update(gain=CONFIG["gain"] + 1),
    "a number of a global object": lambda _: setattr(STATE, "gain", STATE.gain + 1),
    "a tensor of a global object": lambda _: setattr(STATE, "bias", torch.randn(4)),
}


def differences(sampler: fc.Sampler, model: nn.Module) -> list[float]:
    given = [torch.full((2,), t) for t in TIMES]
    return [float((sampler(X, t) - model(X, t)).abs().max()) for t in given]


@pytest.mark.filterwarnings("ignore:.*the sampler is built again")
def test_what_forward_reads_is_followed_one_change_after_the_other() -> None:
    """Tables computed from a constant that was written in place were served for good.

    A write without a version is seen where a trajectory starts, so each change is followed by a whole one.
    """
    model = Reads().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    before = model(X, torch.full((2,), 0.5))
    assert differences(sampler, model) == [0, 0, 0]
    for name, change in CHANGES.items():
        change(model)
        assert differences(sampler, model) == [0, 0, 0], name
        now = model(X, torch.full((2,), 0.5))
        assert not torch.equal(now, before), f"{name}: nothing changed"
        before = now


def test_what_a_method_closes_over_is_followed_and_named() -> None:
    gain, kept = 1.5, [torch.randn(4)]

    class Closes(Reads):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.a(x) * self.b(t[:, None]) * gain + kept[0]

    model = Closes().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    assert differences(sampler, model) == [0, 0, 0]
    gain = 9.0
    with pytest.warns(UserWarning, match=r"gain was 1\.5 when .* and is 9\.0 now; the sampler is built again"):
        assert differences(sampler, model) == [0, 0, 0]
    kept[0] = torch.randn(4)
    assert differences(sampler, model) == [0, 0, 0]


def test_nothing_is_built_again_for_what_only_others_read() -> None:
    model = Reads().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    differences(sampler, model)
    (program,) = sampler._programs.values()
    _set("UNREAD", 3)
    CONFIG["other"] = 2.0
    del CONFIG["other"]
    assert differences(sampler, model) == [0, 0, 0] and sampler._programs.values() == (program,)


UNREAD = 1
