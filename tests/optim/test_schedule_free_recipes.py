"""The codecs of recipes by their shorthands: Schedule-Free's, and those of recipes whose `momentum` is a decay too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import Transform
from tests.data.bowl import Bowl, loss_fn, noise
from tests.small_models import compiled

SHORT: dict[str, tuple[Callable[[], Transform], Callable[[], Transform]]] = {
    "muon": (
        lambda: optim.muon(momentum="int8", second_moment="int8"),
        lambda: optim.stored(optim.muon(momentum=0.95), mu="int8", nu="int8_companded"),
    ),
    "sf_normuon": (
        lambda: optim.sf_normuon(momentum="int8", second_moment="bf16"),
        lambda: optim.stored(optim.sf_normuon(momentum=0.8), mu="int8", nu="bf16"),
    ),
    "sf_adamw": (
        lambda: optim.sf_adamw(second_moment="int8"),
        lambda: optim.stored(optim.sf_adamw(), nu="int8_companded"),
    ),
    "soap": (lambda: optim.soap(momentum="4bit"), lambda: optim.stored(optim.soap(), mu="4bit")),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_shorthand_is_stored(name: str) -> None:
    """Bit for bit, with a codec's numbers in the state."""
    results = []
    for make in SHORT[name]:
        torch.manual_seed(0)
        model = Bowl()
        step = compiled(model, loss_fn, optimizer=make(), mode="eager")
        for update in range(3):
            step(*noise(update))
        results.append([p.detach().clone() for p in model.parameters()])
        assert step.model is model
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert SHORT[name][0]().extras.stored == SHORT[name][1]().extras.stored != {}


def test_codecs_that_are_not_known_or_cannot_hold_a_second_moment() -> None:
    with pytest.raises(ValueError, match="momentum='int7' is not a codec"):
        optim.muon(momentum="int7")
    for make in (optim.muon, optim.sf_adamw, optim.sf_normuon, optim.soap):
        with pytest.raises(ValueError, match="is a second moment"):
            make(second_moment="4bit")
