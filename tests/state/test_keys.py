"""Keys of the flat state: made, split and filtered in one place."""

from __future__ import annotations

import torch

from fusion_compile._state import keys


def test_each_maker_is_undone_by_split() -> None:
    made = {
        keys.params("scalar/float32"): ("params", "scalar/float32"),
        keys.module("scalar/bfloat16@head"): ("module", "scalar/bfloat16@head"),
        keys.optimizer("0/mu/scalar/float32"): ("optimizer", "0/mu/scalar/float32"),
        keys.buffers("bn.running_mean"): ("buffers", "bn.running_mean"),
        keys.metrics("loss"): ("metrics", "loss"),
        keys.counts("step"): ("counts", "step"),
        keys.HYPERPARAMETERS: ("hyperparameters", ""),
    }
    assert {key: keys.split(key) for key in made} == made


def test_a_section_is_the_entries_of_that_name_alone() -> None:
    state = {key: torch.zeros(()) for key in ("params/a", "params/b/c", "paramsx/d", "hyperparameters", "metrics/a")}
    assert set(keys.section(state, keys.PARAMS)) == {"a", "b/c"}
    assert keys.section(state, keys.HYPERPARAMETERS) == {}


def test_the_keys_of_group_1_are_not_those_of_group_11() -> None:
    own = {"params/a": torch.ones(1)}
    shared = {**keys.of_group(1, own), **keys.of_group(11, {"params/a": torch.zeros(1)})}
    assert set(shared) == {"1/params/a", "11/params/a"}
    assert keys.without_group(1, shared)["params/a"] is own["params/a"]
    assert set(keys.without_group(1, shared)) == {"params/a"}
