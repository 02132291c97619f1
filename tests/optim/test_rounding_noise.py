"""Noise for rounding: uniform, without pattern, and a function of seed, count, name and place alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_compile._state.exact_bits import join, split
from fusion_compile.optim import BankInfo, Place
from fusion_compile.optim._rounding_noise import Draw, RoundingNoise
from fusion_compile.optim.codecs.int8_companded import INT8_COMPANDED
from fusion_compile.optim.codecs.stochastic import stochastic_bf16


def draw(seed: int = 1, count: int = 2, salt: str = "") -> Draw:
    return Draw(torch.tensor(seed), torch.tensor(count), salt)


def of_one(name: str, shape: tuple[int, ...], how: Draw) -> Tensor:
    """The noise of a parameter that has a bank of its own."""
    info = BankInfo((Place(name, shape, 0),))
    size = torch.Size(shape).numel()
    return RoundingNoise({"b": info}).draw("b", torch.zeros(size), how).view(shape)


def test_it_does_not_depend_on_the_layout() -> None:
    shapes = {"a.weight": (6, 8), "bias": (5,), "b.weight": (6, 8)}
    alone = {n: of_one(n, s, draw()) for n, s in shapes.items()}
    stacked = BankInfo((Place("b.weight", (6, 8), 0), Place("a.weight", (6, 8), 1)))
    flat = BankInfo((Place("bias", (5,), 0), Place("b.weight", (6, 8), 8), Place("a.weight", (6, 8), 56)))
    noise = RoundingNoise({"spectral/6x8": stacked, "scalar": flat})
    for prepared in (False, True):
        if prepared:
            noise.prepare({"spectral/6x8": torch.zeros(2, 6, 8), "scalar": torch.zeros(104)})
        together = noise.draw("spectral/6x8", torch.zeros(2, 6, 8), draw())
        assert torch.equal(together[0], alone["b.weight"]) and torch.equal(together[1], alone["a.weight"])
        in_a_row = noise.draw("scalar", torch.zeros(104), draw())
        assert torch.equal(in_a_row[:5], alone["bias"])
        assert torch.equal(in_a_row[8:56].view(6, 8), alone["b.weight"])
        assert torch.equal(in_a_row[56:].view(6, 8), alone["a.weight"])


def test_every_argument_counts() -> None:
    base = of_one("w", (4096,), draw())
    others = [
        of_one("v", (4096,), draw()),
        of_one("w", (4096,), draw(seed=3)),
        of_one("w", (4096,), draw(count=3)),
        of_one("w", (4096,), draw(seed=2, count=1)),
        of_one("w", (4096,), draw(salt="mu")),
    ]
    for i, one in enumerate([base, *others]):
        for other in [base, *others][:i]:
            # Two equal numbers of 16 bits are as likely as 1/65536; a shift of places would show as many.
            assert max(int((one.roll(k) == other).sum()) for k in range(-3, 4)) < 8
    assert torch.equal(base, of_one("w", (4096,), draw()))


def test_it_is_uniform_and_uncorrelated_over_places_counts_and_names() -> None:
    """Bounds are 5 standard errors of 2¹⁸ independent numbers."""
    n, size = 64, 4096
    for numbers in (
        torch.stack([of_one("w", (size,), draw(count=c)) for c in range(n)]),
        torch.stack([of_one(f"blocks.{i}.weight", (size,), draw()) for i in range(n)]),
    ):
        u = (numbers.double() + 0.5) / 65536 - 0.5
        bound = 5 / (n * size) ** 0.5
        assert int(numbers.min()) >= 0 and int(numbers.max()) <= 65535
        assert abs(float(u.mean())) < bound * 0.289 and abs(float(u.square().mean() - 1 / 12)) < bound * 0.0745
        assert abs(float((u.sign()).mean())) < bound
        for other in (u.roll(1, 0), u.roll(1, 1), u.roll(7, 1), u.roll((1, 1), (0, 1)), u.roll((-1, 1), (0, 1))):
            assert abs(float((u * other).mean())) < bound / 12
        for bit in range(16):
            assert abs(float(((numbers >> bit) & 1).double().mean()) - 0.5) < bound / 2


def test_a_transform_without_known_banks_draws_too_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    noise = RoundingNoise({})
    assert noise.draw("w", torch.zeros(3, 4, 5), draw()).shape == (3, 4, 5)
    assert noise.draw("w", torch.zeros(7), draw()).shape == (7,)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.exhaustive
def test_inductor_draws_rounds_and_encodes_bit_for_bit() -> None:
    """Compiled for a CPU, on a stacked and a flat bank: noise, bf16, the split in two halves and a code at random."""
    infos = {"flat": BankInfo((Place("a", (300,), 0), Place("b", (50, 7), 512)))}
    noise, flat = RoundingNoise(infos), torch.randn(1024) ** 3
    noise.prepare({"flat": flat})

    def everything(flat: Tensor, seed: Tensor, steps: Tensor) -> dict[str, Tensor]:
        drawn = noise.draw("flat", flat, Draw(seed, steps, "x"))
        shown, lost = split(flat)
        parts = INT8_COMPANDED.encode(flat, drawn)
        return {
            "noise": drawn,
            "bf16": stochastic_bf16(flat, drawn).view(torch.int16),
            "shown": shown.view(torch.int16),
            "lost": lost,
            "back": join(shown, lost),
            "codes": parts[""],
        }

    given = (flat, torch.tensor(123456789), torch.tensor(77))
    found = torch.compile(everything, fullgraph=True)(*given)
    assert all(torch.equal(t, found[name]) for name, t in everything(*given).items())


def test_tables_are_built_once_and_keep_their_address() -> None:
    """A CUDA graph reads them in place; another address would be another recording."""
    banks = {"flat": torch.zeros(8), "stacked": torch.zeros(2, 3, 4)}
    noise = RoundingNoise({})
    noise.prepare(banks)
    flat, names = noise._flat["flat", "cpu"], noise._stacked["stacked", "cpu"]
    held = [flat.owner, flat.starts, flat.names, names]
    assert all(getattr(table, "_dynamo_static_input_type", "") == "unguarded" for table in held)
    noise.prepare({key: bank.clone() for key, bank in banks.items()})
    assert noise._flat["flat", "cpu"] is flat and noise._stacked["stacked", "cpu"] is names
