"""Roles of a denoiser's arguments, given or guessed from names and shapes."""

from __future__ import annotations

import pytest
import torch

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


X, T = torch.zeros(2, 4), torch.zeros(2)


def test_given_roles_come_before_names_and_names_before_shapes() -> None:
    roles = assign_roles({"x": X, "sigma": T, "extra": X, "flag": True}, {"extra": "request"})
    assert roles.by_argument == {"x": "live", "sigma": "step", "extra": "request"}
    assert roles.guessed == ("x", "sigma")
    assert str(roles) == "x=live (guessed), sigma=step (guessed), extra=request"


def test_shapes_decide_where_names_say_nothing() -> None:
    roles = assign_roles({"a": X, "b": T, "d": X, "e": torch.tensor([1, 2])}, None)
    assert roles.by_argument == {"a": "live", "b": "step", "d": "request", "e": "request"}


@pytest.mark.parametrize(
    ("arguments", "given", "sentence"),
    [
        ({"x": X, "t": T}, {"z": "live"}, "roles name 'z', which is no argument of this call"),
        ({"x": X, "t": T}, {"t": "now"}, r"roles\['t'\] is 'now'; use 'step', 'request' or 'live'"),
        ({"x": X, "y": X}, None, r"no argument is the timestep among x: float32\[2, 4\]"),
        ({"t": T, "sigma": T, "x": X}, None, "'t' and 'sigma' is the timestep"),
        ({"x": X, "t": (T, T)}, {"t": "step"}, "'t' is the timestep among x: .*, t: tuple; exactly one tensor must be"),
        ({"t": T, "y": X}, None, "no argument is live"),
    ],
    ids=["unknown argument", "unknown role", "no timestep", "two timesteps", "a tuple", "no latent"],
)
def test_roles_that_do_not_fit_are_refused(arguments: dict[str, object], given: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        assign_roles(arguments, given)


def test_names_alone_leave_unknown_ones_out() -> None:
    assert roles_of_names(["x", "t", "text_embeds", "foo"], {"foo": "live"}) == {
        "x": "live",
        "t": "step",
        "text_embeds": "request",
        "foo": "live",
    }
    assert roles_of_names(["foo"], None) == {}
