"""Any transform with fields of its state in codecs: what is remembered, what is stepped, what is refused."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile._state.flat_tree import flatten
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from fusion_compile.optim.codecs.all_codecs import CODECS
from fusion_compile.optim.codecs.int8 import INT8
from tests.optim.walks import numbers

BANKS = {"spectral/32x48": torch.randn(2, 32, 48), "scalar/float32": torch.randn(1024)}
RECIPES = {
    "adamw": lambda: optim.adamw(),
    "sf_normuon": lambda: optim.sf_normuon(matmul_dtype=torch.float32),
    "soap": lambda: optim.soap(every=2),
    "lion": lambda: optim.lion(),
}


def gradients(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator) for k, p in BANKS.items()}


def walked(transform: Transform, steps: int = 4) -> tuple[Tensors, list[Tensors], object]:
    params, state, moves = dict(BANKS), transform.init(BANKS), []
    for i in range(steps):
        updates, state = transform.update(gradients(i), state, params, numbers(transform, torch.float32))
        params = {k: p + updates[k] for k, p in params.items()}
        moves.append(updates)
    return params, moves, state


@pytest.mark.parametrize("codec", [*CODECS])
@pytest.mark.parametrize("name", RECIPES)
def test_the_first_step_is_the_unstored_one_bit_for_bit(name: str, codec: str) -> None:
    """The state is zeros (or the weights, for z), so only what is remembered after it differs."""
    base = RECIPES[name]()
    kept = optim.stored(base, mu=codec)
    assert (kept.name, kept.roles, kept.descends, dict(kept.hyperparameters)) == (
        base.name,
        base.roles,
        base.descends,
        dict(base.hyperparameters),
    )
    one, other = walked(base, 1)[1][0], walked(kept, 1)[1][0]
    assert all(torch.equal(one[k], other[k]) for k in one)
    far = max(
        float((a - b).abs().max()) for a, b in zip(walked(base)[0].values(), walked(kept)[0].values(), strict=True)
    )
    assert far == 0 if codec == "fp32" else 0 < far < 0.1


def test_the_error_enters_only_through_what_is_remembered() -> None:
    """Two steps of momentum by hand: the second step uses the decoded average, and is itself not encoded."""
    kept = optim.stored(optim.chain(optim.scale_by_momentum(0.9), optim.scale_by_learning_rate(1.0)), mu="int8")
    _, moves, _ = walked(kept, 2)
    for key in BANKS:
        m = 0.1 * gradients(0)[key]
        remembered = INT8.decode(INT8.encode(m, None), m)
        torch.testing.assert_close(moves[1][key], -(remembered + 0.1 * (gradients(1)[key] - remembered)))


def test_state_is_named_for_its_codec_and_small() -> None:
    state = optim.stored(optim.adamw(), mu="int8", nu="int8_companded").init(BANKS)
    paths = dict(flatten(state))
    assert {p.split("/")[3] for p in paths if "mu" in p} == {"mu_int8", "mu_int8_scale"}
    size = sum(p.numel() for p in BANKS.values())
    # 2 bytes, and two scales of 4 for a row of 48 or a block of 512
    assert sum(t.nbytes for t in paths.values() if t.ndim) == 2 * size + 2 * 4 * (64 + 2)
    four = optim.stored(optim.lion(), mu="4bit").init({"scalar": torch.zeros(4096)})
    assert sum(t.nbytes for _, t in flatten(four)) == 4096 * 0.53125


def test_rounding_at_random_counts_steps_and_leaves_the_generator_alone() -> None:
    kept = optim.stored(optim.sf_adamw(), z="bf16")
    before = torch.get_rng_state()
    _, first, state = walked(kept)
    assert int(state.draws["count"]) == 4  # type: ignore[attr-defined]
    assert torch.equal(before, torch.get_rng_state())
    _, again, _ = walked(kept)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
    torch.manual_seed(torch.initial_seed() + 1)
    _, other, _ = walked(kept)
    assert not all(torch.equal(a[k], b[k]) for a, b in zip(first, other, strict=True) for k in a)
    assert optim.stored(optim.lion(), mu="int8").init(BANKS).draws == {}


def test_an_entry_that_is_not_finite_stays_what_it_was_only_where_the_step_says_so() -> None:
    kept = optim.stored(optim.chain(optim.scale_by_momentum(0.5), optim.scale_by_learning_rate(1.0)), mu="int8")
    context = numbers(kept, torch.float32)
    bad = gradients(1)
    bad["scalar/float32"][3] = float("nan")
    _, state = kept.update(gradients(0), kept.init(BANKS), BANKS, context)

    def remembered(finite: bool) -> torch.Tensor:
        context_ = Context(context.hyperparameters, finite=finite)
        _, after = kept.update(bad, state, BANKS, context_)
        moves, _ = kept.update({k: torch.zeros_like(p) for k, p in BANKS.items()}, after, BANKS, context)
        return -2 * moves["scalar/float32"]

    assert bool(remembered(False)[3].isnan()) and int(remembered(False).isnan().sum()) == 1
    assert bool(remembered(True).isfinite().all())
    m = 0.5 * gradients(0)["scalar/float32"]
    assert abs(float(remembered(True)[3] - m[3])) <= 2 * float(remembered(True).abs().max()) / 127


def test_what_cannot_be_stored_is_refused_with_what_can() -> None:
    adamw = optim.adamw()
    with pytest.raises(ValueError, match=r"mu='int4' is not a codec; use one of 'fp32', 'bf16'"):
        optim.stored(adamw, mu="int4")
    with pytest.raises(ValueError, match=r"adamw has no field 'momentum'; it has mu, nu"):
        optim.stored(adamw, momentum="int8")
    with pytest.raises(ValueError, match=r"beta1_power of adamw is a number that all parameters share"):
        optim.stored(adamw, beta1_power="bf16")
    for codec in ("4bit", "int8"):
        with pytest.raises(ValueError, match=rf"nu='{codec}': nu of adamw is a second moment, and its .* into zero"):
            optim.stored(adamw, nu=codec)
    with pytest.raises(ValueError, match="mu of adamw is stored as 'int8' already"):
        optim.stored(optim.stored(adamw, mu="int8"), mu="bf16")
    with pytest.raises(ValueError, match="was given no field"):
        optim.stored(adamw)
    with pytest.raises(TypeError, match="not a Transform"):
        optim.stored("adamw", mu="int8")  # type: ignore[arg-type]


def test_recipes_take_the_codecs_of_their_moments() -> None:
    assert optim.adamw(momentum="int8", second_moment="int8").extras.stored == {"mu": "int8", "nu": "int8_companded"}
    assert optim.normuon(momentum="4bit").extras.stored == {"mu": "4bit"}
    assert optim.lion(momentum="fp32").extras.stored == {}
    with pytest.raises(ValueError, match="momentum='int7' is not a codec"):
        optim.lion(momentum="int7")
