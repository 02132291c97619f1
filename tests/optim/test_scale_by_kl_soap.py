"""`scale_by_kl_soap` against its float64 twin and the official trajectory."""

from __future__ import annotations

import pytest
import torch

from tests.optim import soap_walk
from tests.optim.kronecker_walk import (
    GRADIENTS,
)


def test_it_follows_the_official_trajectory() -> None:
    soap_walk.check_it_follows_the_official_trajectory("kl_soap_fp32_lr")


def test_the_twin_follows_the_official_trajectory() -> None:
    soap_walk.check_the_twin_follows_the_official_trajectory("kl_soap_fp32_lr")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_it_is_its_twin_for_100_updates(dtype: torch.dtype, bound: float) -> None:
    soap_walk.check_it_is_its_twin_for_100_updates("kl_soap", dtype, bound)


def test_the_twin_notices_a_moment_with_another_beta() -> None:
    soap_walk.check_the_twin_notices_a_moment_with_another_beta("kl_soap")


def test_a_rotated_problem_is_solved_alike() -> None:
    soap_walk.check_a_rotated_problem_is_solved_alike("kl_soap")


def test_what_cannot_work_is_refused() -> None:
    soap_walk.check_what_cannot_work_is_refused("kl_soap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_given_is_changed(dtype: torch.dtype) -> None:
    soap_walk.check_nothing_given_is_changed("kl_soap", dtype)


def test_the_graph_does_not_grow_and_reads_nothing() -> None:
    soap_walk.check_the_graph_does_not_grow_and_reads_nothing("kl_soap")


@pytest.mark.parametrize("kind", GRADIENTS)
def test_odd_gradients_leave_everything_finite(kind: str) -> None:
    soap_walk.check_odd_gradients_leave_everything_finite("kl_soap", kind)


def test_it_goes_downhill() -> None:
    soap_walk.check_it_goes_downhill("kl_soap")


def test_a_bank_moves_as_its_members_alone() -> None:
    soap_walk.check_a_bank_moves_as_its_members_alone("kl_soap")
