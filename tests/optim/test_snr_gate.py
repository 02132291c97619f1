"""The SNR gate against its twin, and what it does to noise and to a steady gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile.optim import Transform, chain, scale_by_adam, scale_by_learning_rate, sf_adamw
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.scale_by_mona import scale_by_mona
from fusion_compile.optim.snr_gate import snr_gate
from tests.data.bowl import SHAPES, SPECTRAL
from tests.optim.walks import Walk, a_bank_moves_as_its_members, distance, keeps_the_laws, nodes
from tests.oracles import protocol
from tests.oracles.mona import Mona
from tests.oracles.snr_gate import SnrGate

OPTIONS: list[dict[str, Any]] = [
    {},
    {"source": "update"},
    {"mode": "element"},
    {"mode": "element", "source": "update", "power": 2.0, "floor": 0.3},
    {"power": 0.5, "beta": 0.5},
]


def gated(**options: Any) -> Transform:
    return chain(snr_gate(scale_by_mona(), **options), scale_by_learning_rate(0.02))


def twin(**options: Any) -> Callable[[protocol.Tensors], SnrGate]:
    return lambda p: SnrGate(p, Mona(p).direction, lr=0.02, **options)


def names(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(SHAPES) if options.get("mode") == "element" else SPECTRAL


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gate_follows_its_twin(options: dict[str, Any]) -> None:
    assert distance(gated(**options), twin(**options), torch.float64, names(options)) <= 1e-9


@pytest.mark.parametrize("options", OPTIONS)
def test_fp32_follows_the_float64_twin(options: dict[str, Any]) -> None:
    """100 steps of weights up to 10 times larger than a step, rounded by 6e-8 each: at most 6e-5. Measured: 3e-7."""
    assert distance(gated(**options), twin(**options), torch.float32, names(options)) <= 6e-5


def test_the_bound_sees_a_beta_that_is_slightly_off() -> None:
    assert distance(gated(beta=0.899), twin(), torch.float64, SPECTRAL) > 1e-4


@pytest.mark.parametrize("mode", ["row", "element"])
def test_a_steady_gradient_passes_and_noise_is_braked(mode: str) -> None:
    """√((1 - β) / (1 + β)) is the ratio of the roots of the mean squares; the mean ratio of single entries is a little
    less (a Gaussian's mean size is 0.8 of its root mean square), of rows of 256 entries it is that to a few percent."""
    torch.manual_seed(0)
    steady = torch.randn(8, 256)
    walk = Walk(snr_gate(scale_by_adam(), mode=mode), {"w": torch.zeros(8, 256)})
    for _ in range(10):
        walk({"w": steady})
    assert walk.transform.diagnostics is not None
    assert float(walk.transform.diagnostics(walk.state)["comp/snr_gain"]) == pytest.approx(1.0, abs=1e-5)
    walk = Walk(snr_gate(scale_by_adam(), mode=mode), {"w": torch.zeros(8, 256)})
    for _ in range(200):
        walk({"w": torch.randn(8, 256)})
    brake = math.sqrt(0.1 / 1.9)
    assert float(walk.state.gain) == pytest.approx(brake, rel=0.05 if mode == "row" else 0.25)


def test_the_first_step_passes_unchanged_and_a_dead_row_stays() -> None:
    g = torch.randn(3, 4, 6, dtype=torch.float64)
    g[1, 2] = 0
    walk = Walk(snr_gate(scale_by_mona()), {"w": torch.zeros_like(g)})
    torch.testing.assert_close(walk({"w": g})["w"], g)
    assert float(walk.state.gain) == pytest.approx(11 / 12)


def test_beta_and_floor_are_live_and_the_mean_gain_is_of_all_rows() -> None:
    g1, g2 = torch.randn(2, 2, 6, dtype=torch.float64)
    walk = Walk(snr_gate(scale_by_mona(alpha=0.0), beta=0.9), {"w": torch.zeros_like(g1)})
    walk({"w": g1}, snr_beta=0.5)
    out = walk({"w": g2}, snr_beta=0.75, snr_floor=0.9)["w"]
    m, v = 0.75 * 0.5 * g1 + 0.25 * g2, 0.75 * 0.5 * g1.square().sum(-1) + 0.25 * g2.square().sum(-1)
    correction = 1 - 0.75 * 0.5
    gain = (m.norm(dim=-1) / correction / (v / correction).sqrt()).clamp(0.9, 1.0)
    torch.testing.assert_close(out, gain[:, None] * g2)
    assert float(walk.state.gain) == pytest.approx(float(gain.mean()))


def test_laws() -> None:
    for dtype in (torch.float32, torch.float64):
        for options in OPTIONS:
            params = {"spectral/a": torch.randn(3, 8, 5, dtype=dtype)}
            if options.get("mode") == "element":
                params["scalar/b"] = torch.randn(7, dtype=dtype)
            keeps_the_laws(gated(**options), params)
    a_bank_moves_as_its_members(gated)
    assert nodes(gated(), {"w": torch.empty(4, 8, 5)}) == nodes(gated(), {"w": torch.empty(28, 8, 5)})


def test_state_is_one_buffer_and_a_column_by_row_and_two_buffers_by_element() -> None:
    params = {"w": torch.zeros(3, 8, 5)}
    by_row, by_element = snr_gate(scale_by_mona()).init(params), snr_gate(scale_by_mona(), mode="element").init(params)
    assert (by_row.mean["w"].shape, by_row.square["w"].shape) == ((3, 8, 5), (3, 8, 1))
    assert (by_element.mean["w"].shape, by_element.square["w"].shape) == ((3, 8, 5), (3, 8, 5))


def test_what_the_base_tells_is_passed_on() -> None:
    both = snr_gate(cautious(scale_by_adam()))
    assert both.diagnostics is not None and both.bind is not None
    told = both.bind({}).diagnostics
    assert told is not None
    state = both.init({"w": torch.ones(2, 2)})
    assert list(both.diagnostics(state)) == list(told(state)) == ["comp/cautious_keep_frac", "comp/snr_gain"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: snr_gate(scale_by_mona(), mode="elem"), "mode='elem' is not known; use one of 'row', 'element'"),
        (
            lambda: snr_gate(scale_by_mona(), source="grad"),
            "source='grad' is not known; use one of 'gradient', 'update'",
        ),
        (lambda: snr_gate(scale_by_mona(), power=0.0), r"power=0\.0 must be positive"),
        (lambda: snr_gate(sf_adamw()), r"schedule_free\(adamw\) moves the gradient point"),
        (
            lambda: snr_gate(scale_by_mona()).init({"scalar/b": torch.ones(7)}),
            r"'scalar/b' is \[7\]; use mode='element'",
        ),
    ],
)
def test_refusals(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
