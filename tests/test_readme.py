"""The README's example is run as it stands, uncompiled."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_compile as fc

README = Path(__file__).parents[1] / "README.md"


def test_the_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for name in ("compile_training_step", "optimize_sampler"):
        monkeypatch.setattr(fc, name, functools.partial(getattr(fc, name), mode="eager"))
    names: dict[str, Any] = {}
    exec(example.replace("range(50)", "range(3)"), names)
    assert names["images"].shape == names["x"].shape
    assert torch.isfinite(names["images"]).all()
    assert names["loss"].ndim == 0


def test_every_recipe_is_in_the_readmes_table() -> None:
    text = README.read_text()
    assert all(f'| `"{name}"`' in text for name in fc.optim.RECIPES)
