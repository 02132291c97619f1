"""Nothing in torch and nothing in other objects changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusion_compile as fc
from tests.explain.small_step import small_step


@pytest.fixture
def dit_step() -> fc.TrainingStep:
    return small_step()


def test_what_is_not_being_explained_is_left_alone(dit_step: fc.TrainingStep) -> None:
    """No hook, no handler, no setting stays, and the step's call is the same code before and after."""

    def surroundings() -> dict[str, Any]:
        import logging

        import torch._inductor.config

        trace = logging.getLogger("torch.__trace")
        return {
            "handlers": [*trace.handlers],
            "level": trace.level,
            "dynamo": torch._dynamo.config.get_config_copy(),
            "inductor": torch._inductor.config.get_config_copy(),
            "attributes": set(vars(dit_step)),
            "model": [set(vars(m)) for m in dit_step.model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in dit_step.model.modules()],
            "call": type(dit_step).__call__,
            "compiled": list(dit_step._programs._programs._compiled.values()),
            "grad": torch.is_grad_enabled(),
            "random": torch.get_rng_state().tolist(),
        }

    dit_step.explain()
    before = surroundings()
    fc.explain(dit_step)
    fc.explain(nn.Linear(4, 4), (torch.randn(2, 4),), backend="eager")
    fc.explain(torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),), strict=False))
    after = surroundings()
    after["random"] = before["random"]  # the inputs above drew from it
    assert {k for k in before if before[k] != after[k]} == set()
