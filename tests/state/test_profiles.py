"""Snapshots of profiles: a third width made of two that were kept is the one that was tracked beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fusion_compile._state.profiles import (
    Profile,
    gamma_of,
    read_snapshots,
    reconstructed,
    shares,
    write_snapshot,
)
from tests.oracles.averaged import averages, profile_decay

STEPS, EVERY = 2000, 100


def test_profiles_have_the_papers_exponents() -> None:
    # 2312.02696, section 3.1.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3) and gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    with pytest.raises(ValueError, match=r"0\.28"):
        gamma_of(0.3)


def test_a_profile_that_was_kept_is_itself() -> None:
    kept = [Profile(100, 6.94), Profile(200, 6.94), Profile(200, 16.97)]
    assert np.allclose(shares(kept, kept[2]), [0, 0, 1], atol=1e-9)


def test_a_third_width_is_the_tracked_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    # Weights that move as those of a training do: far at first, less and less, with noise.
    weights = np.cumsum(generator.normal(size=(STEPS, 16)) / np.sqrt(1 + np.arange(STEPS))[:, None], 0)
    tracked = {
        width: np.stack(
            [*averages(np.zeros(16), weights, [profile_decay(n, gamma_of(width)) for n in range(1, STEPS + 1)])]
        )
        for width in (0.05, 0.08, 0.10)
    }
    for n in range(EVERY, STEPS + 1, EVERY):
        for width in (0.05, 0.10):
            named = {"weight": torch.tensor(tracked[width][n - 1]).float()}
            write_snapshot(tmp_path, f"ema_{width}", Profile(n, gamma_of(width)), named)
    for updates in (None, STEPS // 2):
        want = torch.tensor(tracked[0.08][(updates or STEPS) - 1]).float()
        found = reconstructed(tmp_path, 0.08, updates)["weight"]
        # The bound of the study; profiles between two that were kept are no exact sums of theirs.
        assert (found - want).norm() / want.norm() < 1e-3
        plain = torch.tensor(tracked[0.10][(updates or STEPS) - 1]).float()
        assert (plain - want).norm() / want.norm() > 1e-2  # it is no bound that any width would keep


def test_other_files_are_none_and_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="has no snapshots of averages"):
        read_snapshots(tmp_path)
    path = write_snapshot(tmp_path, "wide", Profile(10, 6.94), {"weight": torch.ones(2)})
    assert read_snapshots(tmp_path) == {path: Profile(10, 6.94)}
    with pytest.raises(ValueError, match="end at 10; give that or fewer"):
        reconstructed(tmp_path, 0.1, 11)
    write_snapshot(tmp_path, "wide", Profile(20, 6.94), {"bias": torch.ones(2)})
    with pytest.raises(ValueError, match="has other parameters than"):
        reconstructed(tmp_path, 0.1)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        read_snapshots(tmp_path)
