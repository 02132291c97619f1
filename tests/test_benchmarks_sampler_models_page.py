"""docs/sampler-models.md is what its command writes, and says of every model what has to be said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.models.cases import NAMES
from tests.models.tiny import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _published_configs  # type: ignore[import-not-found]
    import _sampler_models_page  # type: ignore[import-not-found]

    yield _sampler_models_page, _published_configs


@pytest.fixture
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs/benchmarks/sampler_models.json").read_text())
    return found


def test_the_page_is_written_from_the_numbers(
    benchmarks: tuple[ModuleType, ModuleType], results: dict[str, Any]
) -> None:
    writer, configs = benchmarks
    assert (ROOT / "docs/sampler-models.md").read_text() == writer.page(results, NAMES, list(configs.PUBLISHED))


def test_every_model_is_on_it(benchmarks: tuple[ModuleType, ModuleType], results: dict[str, Any]) -> None:
    _, configs = benchmarks
    assert set(results["tiny"]) == set(NAMES) and set(results["full"]) == set(configs.PUBLISHED)
    published = {entry.class_name for entry in configs.PUBLISHED.values()}
    assert published == {tiny.class_name for name, tiny in TINY.items() if name != "Lumina2"}


def test_what_was_measured_keeps_the_promises(results: dict[str, Any]) -> None:
    for numbers in results["tiny"].values():
        assert numbers["exact_difference"] == 0
        read_once = numbers["weight_bytes"]["table"] + numbers["weight_bytes"]["prologue"]
        assert 0.9 * read_once < numbers["freed_bytes"] <= read_once  # less what the table holds of positions
    for name, share in {"DiT-XL/2 256": 0.405, "SD3.5-large": 0.335, "Flux.1-dev": 0.275, "Qwen-Image": 0.334}.items():
        weights = results["full"][name]["weights"]
        freed = sum(size for time, (_, size) in weights.items() if time not in ("live", "unread"))
        total = sum(size for _, size in weights.values())
        assert freed / total >= share - 0.005  # the shares of modulation in the published weights
