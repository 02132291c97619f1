"""Roles of a denoiser's arguments, given or guessed from names and shapes."""

from __future__ import annotations

import pytest

from fusion_compile._sampler.graph.roles import assign_roles, roles_of_names
from tests.models.cases import NAMES, case

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning")


@pytest.mark.parametrize("name", NAMES)
def test_roles_are_told_by_the_names_of_the_arguments(name: str) -> None:
    c = case(name)
    arguments = c.call()
    roles = assign_roles(arguments, None)
    assert roles.named("step") == (c.step,) and roles.named("live") == (c.live,)
    assert roles_of_names(list(roles.by_argument), None) == roles.by_argument  # no shape was asked


def test_what_a_controlnet_adds_changes_with_the_latent() -> None:
    names = ["controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states"]
    assert set(roles_of_names(names, None).values()) == {"live"}
    others = ["joint_attention_kwargs", "added_cond_kwargs", "image_rotary_emb", "encoder_hidden_states_image", "style"]
    assert set(roles_of_names(others, None).values()) == {"request"}
