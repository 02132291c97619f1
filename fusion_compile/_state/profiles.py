"""Snapshots of averages with EDM2's power function profile, and any other width made of them afterwards.

Source: 2312.02696, section 3.2 and appendix C: the weights of the snapshots are the least-squares solution for which
their profiles sum up to the wanted one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusion_compile._types import Tensors

KIND = "fusion_compile EMA snapshot 1"
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Profile(NamedTuple):
    """A power function profile after `updates` steps; `gamma`: its exponent."""

    updates: int
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """γ of the power function profile with this relative width: the largest root of
    ``(γ + 1) = σ² (γ + 2)² (γ + 3)`` (2312.02696, equation 126).

    Raises:
        ValueError: No profile is so wide.
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel={sigma_rel} must lie above 0 and below 0.28, the width of the flat profile.")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def write_snapshot(folder: str | PathLike[str], name: str, profile: Profile, weights: Tensors) -> Path:
    """Write one file into `folder`, which is made where it is missing. It appears whole or not at all."""
    into = Path(folder).expanduser()
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{name}-{profile.updates:09d}.safetensors"
    temporary = into / f"{path.name}.{secrets.token_hex(4)}"
    about = {"kind": KIND, "updates": str(profile.updates), "gamma": repr(profile.gamma)}
    plain = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in weights.items()}
    try:
        save_file(plain, temporary, about)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files private
    return path


def read_snapshots(folder: str | PathLike[str]) -> dict[Path, Profile]:
    """The snapshots of `folder`. Other files are none."""
    found = {}
    for path in sorted(Path(folder).expanduser().glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it, and take the snapshots that are left."
            ) from error
        if about.get("kind") == KIND:
            found[path] = Profile(int(about["updates"]), float(about["gamma"]))
    if not found:
        raise FileNotFoundError(f"{folder} has no snapshots of averages; ema.snapshot({str(folder)!r}) writes them.")
    return found


def shares(of: Sequence[Profile], wanted: Profile) -> Floats:
    """The least-squares shares of the profiles `of` in `wanted`."""
    times, gammas = np.array([p.updates for p in of], float), np.array([p.gamma for p in of], float)
    among = _product(times[:, None], gammas[:, None], times[None], gammas[None])
    with_wanted = _product(times, gammas, np.array(float(wanted.updates)), np.array(wanted.gamma))
    return np.asarray(np.linalg.lstsq(among, with_wanted, rcond=None)[0], np.float64)


def _product(t: Floats, gamma: Floats, other_t: Floats, other_gamma: Floats) -> Floats:
    """The inner product of two profiles (2312.02696, equation 151)."""
    exponent = np.where(t < other_t, other_gamma, -gamma)
    scale = (gamma + 1) * (other_gamma + 1) * (t / other_t) ** exponent
    found: Floats = scale / ((gamma + other_gamma + 1) * np.maximum(t, other_t))
    return found


def reconstructed(folder: str | PathLike[str], sigma_rel: float, updates: int | None = None) -> Tensors:
    """The average of width `sigma_rel` after `updates` steps (the last snapshot's), fp32 by parameter name.

    One tensor of all snapshots is in memory at a time. Raises ValueError for a count beyond the last snapshot's, and
    for snapshots of different models.
    """
    snapshots = read_snapshots(folder)
    last = max(profile.updates for profile in snapshots.values())
    wanted = Profile(last if updates is None else updates, gamma_of(sigma_rel))
    if not min(p.updates for p in snapshots.values()) <= wanted.updates <= last:
        raise ValueError(f"updates={updates}: the snapshots in {folder} end at {last}; give that or fewer.")
    used = {path: profile for path, profile in snapshots.items() if profile.updates <= wanted.updates}
    parts = shares([*used.values()], wanted)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in used]
        names = set(files[0].keys())
        if odd := next((path for path, file in zip(used, files, strict=True) if set(file.keys()) != names), None):
            raise ValueError(f"{odd} has other parameters than {next(iter(used))}; keep each model's snapshots apart.")
        found = {}
        for name in sorted(names):
            total = sum(float(share) * file.get_tensor(name).double() for share, file in zip(parts, files, strict=True))
            assert isinstance(total, torch.Tensor)
            found[name] = total.float()
    return found
