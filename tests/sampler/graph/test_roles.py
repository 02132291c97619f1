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
    names += ["down_block_additional_residuals", "mid_block_additional_residual"]
    assert set(roles_of_names(names, None).values()) == {"live"} and len(roles_of_names(names, None)) == 5
    images = ["controlnet_cond", "controlnet_mode", "down_intrablock_additional_residuals", "control_hidden_states"]
    assert set(roles_of_names(images, None).values()) == {"request"} and len(roles_of_names(images, None)) == 4
    others = ["joint_attention_kwargs", "added_cond_kwargs", "image_rotary_emb", "encoder_hidden_states_image", "style"]
    assert set(roles_of_names(others, None).values()) == {"request"}


X, T = torch.zeros(2, 4), torch.zeros(2)


def test_given_roles_come_before_names_and_names_before_shapes() -> None:
    roles = assign_roles({"x": X, "sigma": T, "extra": X, "flag": True}, {"extra": "request"})
    assert roles.by_argument == {"x": "live", "sigma": "step", "extra": "request"}
    assert roles.guessed == ("x", "sigma")
    assert str(roles) == "x=live (guessed), sigma=step (guessed), extra=request"


@pytest.mark.parametrize(
    "clocks",
    [
        ("timestep", "sigma"),  # LTX-2
        ("timestep", "timestep_r"),  # HunyuanVideo-1.5
        ("t", "r"),  # MeanFlow
        ("timestep", "r_timestep"),  # AnyFlow
        ("timestep", "target_timestep"),
        ("timestep", "audio_timestep", "sigma", "audio_sigma"),
        ("timestep", "vision_timesteps"),
    ],
)
def test_a_model_may_have_several_clocks(clocks: tuple[str, ...]) -> None:
    arguments = {"x": X, **dict.fromkeys(clocks, T), "text": X}
    assert assign_roles(arguments, None).named("step") == clocks
    assert assign_roles(arguments, {clocks[0]: "step"}).named("step") == clocks
    assert assign_roles(arguments, {clocks[1]: "request"}).named("step") == tuple(c for c in clocks if c != clocks[1])


def test_hidden_states_are_live_unless_an_encoder_gave_them() -> None:
    live = ["hidden_states", "audio_hidden_states", "vision_hidden_states", "video_hidden_states"]
    request = ["encoder_hidden_states", "audio_encoder_hidden_states", "prompt_hidden_states", "t5_hidden_states"]
    assert set(roles_of_names(live, None).values()) == {"live"}
    assert set(roles_of_names(request, None).values()) == {"request"}
    conditions = roles_of_names(["timestep_cond", "sigma_embeds", "global_hidden_states"], None)
    assert set(conditions.values()) == {"request"}


def test_each_of_several_streams_has_a_timestep_by_its_prefix() -> None:
    clocks = roles_of_names(["timestep_img", "timestep_text", "timestep_indices", "timestep_mask"], None)
    assert clocks == {"timestep_img": "step", "timestep_text": "step", "timestep_mask": "request"}


def test_a_list_of_latents_is_live_if_no_tensor_is() -> None:
    assert assign_roles({"vision_tokens": [X, X], "t": T}, None).named("live") == ("vision_tokens",)
    assert assign_roles({"tokens": [X, X], "a": X, "t": T}, None).by_argument == {
        "tokens": "request",
        "a": "live",
        "t": "step",
    }


def test_shapes_decide_where_names_say_nothing() -> None:
    roles = assign_roles({"a": X, "b": T, "d": X, "e": torch.tensor([1, 2])}, None)
    assert roles.by_argument == {"a": "live", "b": "step", "d": "request", "e": "request"}


@pytest.mark.parametrize(
    ("arguments", "given", "sentence"),
    [
        ({"x": X, "t": T}, {"z": "live"}, "roles name 'z', which is no argument of this call"),
        ({"x": X, "t": T}, {"t": "now"}, r"roles\['t'\] is 'now'; use 'step', 'request' or 'live'"),
        ({"x": X, "y": X}, None, r"no argument is the timestep among x: float32\[2, 4\]"),
        (
            {"x": X, "now": torch.ones(2).long()},
            None,
            r"Pass roles=\{'now': 'step'\} if it is 'now'",
        ),
        ({"t": T, "y": X}, None, r"no argument is live .*Pass roles=\{'y': 'live'\} if it is 'y'"),
    ],
    ids=["unknown argument", "unknown role", "no timestep", "the likeliest timestep", "no latent"],
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
