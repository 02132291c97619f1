"""The page on the sampler: its snippets run in order, and every public name of the sampler is on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs/sampler.md").read_text(encoding="utf-8")


def test_the_snippets_run_and_do_what_their_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(snippet, names)
    assert "sampler of Model, 8 steps, mode 'eager', exact" in capsys.readouterr().out
    assert names["sampler"].timesteps.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert names["freed"] > 0 and names["images"].shape == (2, 4)
    assert len(names["fixed"].report.programs) == 1 and len(names["low_rank"].report.programs) == 0


def test_public_names_and_options_are_on_the_page() -> None:
    words = set(re.findall(r"\w+", PAGE))
    assert {"Exact", "Batched", "Rank", "Sampler", "SamplerReport", "release_weights", "unconditional"} <= words
