"""Assign roles to a denoiser's arguments: the timestep, the request, and the live latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from fusion_compile.passes import BindingTime

Role = Literal["step", "request", "live"]

BINDING_TIMES: dict[Role, BindingTime] = {
    "step": BindingTime.STEP,
    "request": BindingTime.REQUEST,
    "live": BindingTime.LIVE,
}

_NAMES: dict[Role, str] = {
    "step": "t ts time times timestep timesteps time_step time_steps sigma sigmas noise_level tau t_cond time_cond "
    "r r_timestep timestep_r target_timestep next_timestep prev_timestep timestep_next t_next next_t t_hat sigma_next "
    "sigma_hat timesteps_r",
    "live": "x xt x_t z zt z_t sample latent latents noisy_latents hidden_states noisy input inputs img image "
    "images noise vision_tokens sound_tokens action_tokens video_tokens audio_tokens latent_tokens action actions "
    "noisy_actions block_controlnet_hidden_states latent_image_embeds down_block_additional_residuals "
    "mid_block_additional_residual",
    "request": "y c label labels class_label class_labels text context cond conditioning encoder_hidden_states "
    "guidance pooled_projections prompt_embeds caption mask attention_mask encoder_attention_mask img_ids txt_ids "
    "global_hidden_states rotary_embedding freqs_cis style ofs obs obs_tokens observation observations state "
    "states proprio controlnet_cond controlnet_mode down_intrablock_additional_residuals",
}
_ROLE_OF_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}

_PREFIXES: dict[Role, tuple[str, ...]] = {
    "live": ("controlnet_", "noisy_"),  # a ControlNet sees the latent, but for the image that it is conditioned on
    "request": ("encoder_", "text_", "txt_", "prompt_", "pooled_", "caption_", "cap_", "class_", "added_cond"),
}
_OF_TEXT = ("encoder", "text", "txt", "prompt", "caption", "cap_", "t5", "clip", "llama", "pooled")
"""Parts of names of hidden states that come from an encoder."""
_STILL = ("control_", "pose_", "clean_", "_cond_", "reference_")
"""Parts of names of hidden states that a video follows, which stay as they are through a request; those without any of
these parts are a stream of latents."""
_OF_CONDITIONS = ("image", "context", "cond", "clean", "control", "inpaint", "mask", "ref", "history", "prefix")
"""Parts of names of latents that stay as they are through a request."""
_SUFFIXES: dict[Role, tuple[str, ...]] = {
    "step": ("_timestep", "_timesteps", "_timestep_r", "_sigma", "_sigmas", "_time"),
    "request": (
        *("_mask", "_masks", "_ids", "_emb", "_embed", "_embeds", "_embedding", "_embeddings", "_feats"),
        *("_shapes", "_size", "_coords", "_cond", "_kwargs", "_labels"),
    ),
}


@dataclass(frozen=True)
class Roles:
    """`by_argument`: the role of each argument that holds tensors. `guessed`: names the caller left out."""

    by_argument: dict[str, Role]
    guessed: tuple[str, ...]

    def named(self, role: Role) -> tuple[str, ...]:
        """The arguments of one role, in the order of the signature."""
        return tuple(name for name, r in self.by_argument.items() if r == role)

    def __str__(self) -> str:
        parts = [f"{n}={r}{' (guessed)' if n in self.guessed else ''}" for n, r in self.by_argument.items()]
        return ", ".join(parts)


def assign_roles(arguments: Mapping[str, Any], given: Mapping[str, str] | None) -> Roles:
    """Roles of `arguments` (name -> value as passed to forward); those not in `given` are guessed.

    Names are tried first, then shapes. Of the arguments without a known name, a floating tensor of two or more
    dimensions is live if no other is. A floating 0-dim or 1-dim tensor is the timestep if no other is. The rest belongs
    to the request. Several arguments may be timesteps: a sigma beside it, the time of each of two streams, the time
    that a flow map jumps to. Raises ValueError for a role or argument that does not exist, unless at least one
    argument is the timestep, and unless at least one is live.
    """
    given = dict(given or {})
    tensors = {name: value for name, value in arguments.items() if _holds_tensor(value)}
    for name, role in given.items():
        if name not in arguments:
            raise ValueError(
                f"roles name {name!r}, which is no argument of this call; its arguments are {list(arguments)}."
            )
        if role not in BINDING_TIMES:
            raise ValueError(f"roles[{name!r}] is {role!r}; use 'step', 'request' or 'live'.")
    roles = {name: cast(Role, given[name]) for name in tensors if name in given}
    unnamed = []
    for name in tensors:
        if name not in roles:
            guess = _role_of_name(name)
            if guess is None or (guess == "step" and "step" in given.values() and not _is_a_clock(tensors[name])):
                unnamed.append(name)
            else:
                roles[name] = guess
    for name in sorted(unnamed, key=lambda n: not isinstance(tensors[n], Tensor)):
        roles[name] = _role_of_shape(tensors[name], set(roles.values()))
    result = Roles({name: roles[name] for name in tensors}, tuple(name for name in tensors if name not in given))
    steps = result.named("step")
    if not steps:
        raise ValueError(
            f"no argument is the timestep among {_described(tensors)}; one tensor must be, or several where the model "
            f"has several clocks. {_advice(result, 'step', [n for n in tensors if _is_a_clock(tensors[n])])}"
        )
    if not result.named("live"):
        raise ValueError(
            f"no argument is live among {_described(tensors)}: the latent, which changes at every call, must be. "
            f"{_advice(result, 'live', [n for n in tensors if not _is_a_clock(tensors[n])])}"
        )
    return result


def roles_of_names(names: Sequence[str], given: Mapping[str, str] | None) -> dict[str, Role]:
    """Roles by `given` or by name alone; arguments without a known name are left out."""
    roles: dict[str, Role] = {}
    for name in names:
        role = cast("Role | None", (given or {}).get(name)) or _role_of_name(name)
        if role is not None:
            roles[name] = role
    return roles


def _role_of_name(name: str) -> Role | None:
    """Guess from the whole name, else from its beginning, else from its end."""
    name = name.lower()
    if name in _ROLE_OF_NAME:
        return _ROLE_OF_NAME[name]
    for role, prefixes in _PREFIXES.items():
        if name.startswith(prefixes):
            return role
    if name.endswith("_latents"):
        return "request" if any(part in name for part in _OF_CONDITIONS) else "live"
    if name.endswith("hidden_states"):
        return "request" if any(part in name for part in (*_OF_TEXT, *_STILL)) else "live"
    by_suffix = next((role for role, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)
    return "step" if by_suffix is None and name.startswith("timestep_") and "ind" not in name else by_suffix


def _advice(found: Roles, role: Role, candidates: list[str]) -> str:
    """The dictionary to pass: `role` for the likeliest argument, and what the others were taken for."""
    so_far = f"the roles so far are {dict(found.by_argument)}."
    if not candidates:
        return f"Pass roles={ {'name': role} } with the argument that is; {so_far}"
    return f"Pass roles={ {candidates[0]: role} } if it is {candidates[0]!r}; {so_far}"


def _role_of_shape(value: Any, taken: set[Role]) -> Role:
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value):
        return "live" if "live" not in taken and all(_looks_live(one) for one in value) else "request"
    if isinstance(value, Tensor) and value.is_floating_point():
        if _looks_live(value) and "live" not in taken:
            return "live"
        if value.dim() <= 1 and "step" not in taken:
            return "step"
    return "request"


def _looks_live(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 2


def _is_a_clock(value: Any) -> bool:
    """Whether `value` has the form of one time for all, or one for each sample."""
    return isinstance(value, Tensor) and value.dim() <= 1


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _described(tensors: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{n}: {str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
        if isinstance(v, Tensor)
        else f"{n}: {type(v).__name__}"
        for n, v in tensors.items()
    )
