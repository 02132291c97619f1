"""Checkpoints: state keyed by full parameter name, in safetensors plus a JSON index."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.mismatches import mismatches, refuse_mismatches
from fusion_compile._state.named_state import named_state
from fusion_compile._types import Tensors

FORMAT = 1
INDEX = "checkpoint.json"
_STATE_SECTIONS = ("optimizer", "counts", "buffers", "carried", "rng")
_WRITTEN = re.compile(rf"(model|state)-\d+-[0-9a-f]{{8}}\.safetensors|{re.escape(INDEX)}\.\d+-[0-9a-f]{{8}}")
"""Names of the files that `save` makes besides the index. Nothing else in the folder is ever removed."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the model's state_dict() is a {type(value).__name__}; a checkpoint holds tensors. Let "
                f"get_extra_state() return a tensor."
            )
    return tensors


def state_dict(
    model: nn.Module, layout: Layout, state: Tensors, hyperparameters: Hyperparameters, steps_called: int
) -> dict[str, Any]:
    """Copy everything that a resumed run needs, apart from plain numbers that user code keeps.

    ``buffers``: those that the loss changes and ``model`` lacks. ``carried``: tensors that user code keeps in Python.
    """
    rng = {"cpu": torch.get_rng_state()}
    if layout.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(layout.device)
    tensors = model_tensors(model)
    sections = {
        "model": tensors,
        "optimizer": named_state(layout, state),
        "counts": keys.section(state, keys.COUNTS),
        "buffers": {n: t for n, t in keys.section(state, keys.BUFFERS).items() if n not in tensors},
        "carried": keys.section(state, keys.CARRIED),
    }
    return {
        **{section: {n: t.detach().clone() for n, t in named.items()} for section, named in sections.items()},
        "hyperparameters": hyperparameters.state_dict(),
        "steps_called": steps_called,
        "rng": rng,
    }


def load_state_dict(
    saved: Mapping[str, Any], model: nn.Module, layout: Layout, state: Tensors, hyperparameters: Hyperparameters
) -> int:
    """Check everything, then copy everything into place. Returns the number of calls so far."""
    targets = {
        "model": model_tensors(model),
        "optimizer": named_state(layout, state),
        "counts": keys.section(state, keys.COUNTS),
    }
    if absent := [key for key in (*targets, "hyperparameters", "steps_called") if key not in saved]:
        raise ValueError(
            f"this is no state of a training step: it lacks {', '.join(absent)}. Give what state_dict() gave."
        )
    # The loss's first run shows which buffers outside the model's state_dict() it changes. Before that run, trust the
    # checkpoint.
    buffers = dict(model.named_buffers())
    targets["buffers"] = {n: buffers[n] for n in saved.get("buffers", {}) if n in buffers}
    _refuse_mismatches(saved, targets, "Build the step with the model, recipe and groups that saved it.")
    numbers = hyperparameters.read(saved["hyperparameters"])
    with torch.no_grad():
        for section, wanted in targets.items():
            for name, tensor in wanted.items():
                tensor.copy_(saved[section][name])
    hyperparameters.update(numbers)
    rng = saved.get("rng", {})
    if "cpu" in rng:
        torch.set_rng_state(rng["cpu"].cpu())
    if "cuda" in rng and layout.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"].cpu(), layout.device)
    return int(saved["steps_called"])


def of(source: str | PathLike[str] | Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """The state that `source` is, or that lies in the folder `source`. Anything else is refused."""
    if isinstance(source, Mapping):
        if absent := [key for key in ("model", "optimizer") if key not in source]:
            raise ValueError(
                f"this is no state of a training step: it lacks {', '.join(absent)}. Give what state_dict() gave."
            )
        return source
    if not isinstance(source, str | PathLike):
        raise TypeError(
            f"the source is a {type(source).__name__}; give the folder that save() wrote or what state_dict() gave."
        )
    return load(source, device)


def load_model(saved: Mapping[str, Any], model: nn.Module) -> None:
    """Copy only the ``model`` section into place. A mismatch is a ValueError, and nothing is loaded."""
    wanted = model_tensors(model)
    _refuse_mismatches(saved, {"model": wanted}, "Build the step with the model that the checkpoint is of.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved["model"][name])


def _refuse_mismatches(saved: Mapping[str, Any], targets: Mapping[str, Tensors], remedy: str) -> None:
    lines: list[str] = []
    for section, wanted in targets.items():
        lines += mismatches(wanted, saved.get(section, {}), lambda name, section=section: f"{section} {name}")  # type: ignore[misc]
    refuse_mismatches(lines, remedy)


def save(path: str | PathLike[str], saved: Mapping[str, Any]) -> None:
    """Write the folder `path`: ``model-….safetensors`` (the deployable weights), ``state-….safetensors`` and the index.

    The tensor files are written under new names and flushed first. Renaming the index into place is the one moment at
    which the new checkpoint exists. A process killed before it leaves the old checkpoint, one killed after it the new.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"{saved['steps_called']}-{secrets.token_hex(4)}"
    files = {"model": f"model-{tag}.safetensors", "state": f"state-{tag}.safetensors"}
    _write_tensors(folder / files["model"], saved["model"])
    parts = {f"{s}/{n}": t for s in _STATE_SECTIONS for n, t in saved.get(s, {}).items()}
    _write_tensors(folder / files["state"], parts)
    index = {
        "format": FORMAT,
        "files": files,
        "steps_called": saved["steps_called"],
        "hyperparameters": saved["hyperparameters"],
        "numbers": saved.get("numbers", {}),
        "torch": torch.__version__,
    }
    temporary = folder / f"{INDEX}.{tag}"
    with open(temporary, "w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / INDEX)
    _sync_folder(folder)
    for old in folder.iterdir():
        if _WRITTEN.fullmatch(old.name) and old.name not in files.values():
            old.unlink(missing_ok=True)


def load(path: str | PathLike[str], device: torch.device) -> dict[str, Any]:
    """Read a folder that `save` wrote. Anything else is a FileNotFoundError or ValueError."""
    folder = Path(path)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no {INDEX}; give the folder that TrainingStep.save() wrote.")
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"{folder / INDEX} has format {index['format']}; this version reads format {FORMAT}.")
        out: dict[str, Any] = {
            "model": _read_tensors(folder / index["files"]["model"], device),
            "steps_called": index["steps_called"],
            "hyperparameters": index["hyperparameters"],
            "numbers": index.get("numbers", {}),
            **{section: {} for section in _STATE_SECTIONS},
        }
        for name, tensor in _read_tensors(folder / index["files"]["state"], device).items():
            section, _, rest = name.partition("/")
            out[section][rest] = tensor
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}); nothing was loaded. Give another checkpoint."
        ) from error
    return out


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Tied weights appear under two names with one storage, which safetensors refuses; each name is written in full.
    save_file({n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, path)
    # safetensors makes its files private; a checkpoint is as readable as the folder it lies in.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
