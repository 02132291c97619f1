"""The models of this folder as cases: a model, a call of it and the roles that its arguments have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from dit import DiT
from torch import Tensor, nn

from fusion_compile._sampler.without_weights.diffusers_calls import example_schedule
from tests.models.published_style import ActionHead, Guided, PublishedDiT, PublishedSiT
from tests.models.tiny import TINY, tiny_call, tiny_model

N_STEPS = 8
WITH_UNKNOWN_NAMES = "unknown names"


@dataclass(frozen=True)
class Case:
    """`call()`: arguments of one call, another each time. `schedule` ``[N_STEPS]``. `step`, `live`: their names."""

    model: nn.Module
    call: Callable[[], dict[str, Any]]
    schedule: Tensor
    step: str
    live: str

    def at(self, request: dict[str, Any], i: int) -> dict[str, Any]:
        """The call of step `i` with the request of the call `request` and another latent."""
        t = self.schedule[i].expand(request[self.step].shape).clone()
        return request | {self.live: self.call()[self.live], self.step: t}


def _labels(n: int = 10) -> Tensor:
    return torch.randint(0, n, (2,))


def _time() -> Tensor:
    return torch.full((2,), 0.5)


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str]] = {
    "examples/dit.py": (
        lambda: DiT(hidden_size=32, depth=2, num_heads=2),
        lambda: {"x": torch.randn(2, 1, 8, 8), "t": _time(), "y": _labels()},
        "unit",
    ),
    "published DiT": (
        PublishedDiT,
        lambda: {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": _labels(11)},
        "index",
    ),
    "published DiT, guided": (
        lambda: Guided(PublishedDiT(), 4.0),
        lambda: {"x": torch.randn(2, 4, 8, 8), "t": torch.full((2,), 500), "y": _labels(11)},
        "index",
    ),
    "published SiT": (
        PublishedSiT,
        lambda: {"xt": torch.randn(2, 4, 8, 8), "sigma": _time(), "label": _labels()},
        "unit",
    ),
    "action head": (
        ActionHead,
        lambda: {
            "noisy_actions": torch.randn(2, 8, 5),
            "tau": _time(),
            "obs_tokens": torch.randn(2, 6, 12),
            "proprio": torch.randn(2, 7),
        },
        "unit",
    ),
}
LIVE = {"examples/dit.py": "x", "published DiT": "x", "published DiT, guided": "x", "published SiT": "xt"}
LIVE |= {"action head": "noisy_actions", "Z-Image": "x"}
STEP = {"published SiT": "sigma", "action head": "tau"}

NAMES = [*OWN, *(name for name in TINY if name != "Lumina2")]


@lru_cache(maxsize=1)
def case(name: str) -> Case:
    """The same model each time as long as one name is asked for; weights are nowhere zero."""
    live = LIVE.get(name, "hidden_states")
    if name in TINY:
        model = tiny_model(name)
        call = tiny_call(name, model, N_STEPS)
        step = "t" if "t" in call.arguments else "timestep"
        return Case(model, lambda: tiny_call(name, model, N_STEPS).arguments, call.schedule, step, live)
    make, call_of, clock = OWN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
    schedule = example_schedule(clock, N_STEPS)  # type: ignore[arg-type]
    return Case(copy.deepcopy(model), call_of, schedule, STEP.get(name, "t"), live)
