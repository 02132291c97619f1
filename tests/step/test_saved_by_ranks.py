"""Tests: what ranks save, any number of them loads, bit for bit, and so does one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import programs as P
from tests.ranks.conftest import two_ranks as two_ranks

FORMS = ("optimizer", "replicate")


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("loaded", FORMS)
def test_either_form_loads_the_other(two_ranks: Any, saved: str, loaded: str) -> None:
    for seen in two_ranks("saved"):
        assert seen[saved, loaded, "bits"] and seen[saved, loaded, "random"]
        assert seen[saved, loaded, "goes on"] <= (0.0 if saved == loaded else 1e-6)  # the order of additions


@pytest.mark.parametrize("saved", FORMS)
def test_one_process_loads_what_ranks_saved_and_goes_on(two_ranks: Any, saved: str) -> None:
    found = dict(two_ranks("saved")[0][saved, "folder"])
    found.pop("computed_on")
    step = P.step_of("sf_normuon", model=P.net(9))
    step.load_state_dict(found)
    back = step.state_dict()
    for section in ("model", "optimizer", "counts"):
        assert back[section].keys() == found[section].keys()
        assert all(torch.equal(t, found[section][name]) for name, t in back[section].items())
    step(*P.whole_batches(3)[2])
    twin = P.step_of("sf_normuon")
    for batch in P.whole_batches(3):
        twin(*batch)
    assert float((P.flat(step.model) - P.flat(twin.model)).abs().max()) <= 2e-6  # the order of additions


def test_another_recipe_starts_from_it(two_ranks: Any) -> None:
    for seen in two_ranks("saved"):
        assert [seen[form, "warm"].partition(";")[0] for form in FORMS] == ["carried mu"] * 2
