"""Run the specified classes through a sampler: exact, or refused with its reason."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile.sampler import optimize_sampler
from tests.models.exported import images, others, pipelines, unets, videos
from tests.models.exported.spec import Exported, mask, noise, unit
from tests.models.tiny import TINY

EXPORTED: dict[str, Exported] = {
    **unets.EXPORTED,
    **images.EXPORTED,
    **videos.EXPORTED,
    **others.EXPORTED,
    **pipelines.EXPORTED,
}
EXPORTED["Lumina2Transformer2DModel"] = Exported(
    TINY["Lumina2"].config,
    lambda t: {
        "hidden_states": noise(4, 8, 8),
        "timestep": unit(t),
        "encoder_hidden_states": noise(6, 12),
        "encoder_attention_mask": mask(6).bool(),
    },
)
TIMES = (0.9, 0.6, 0.3)
NOT_TRIED: dict[str, str] = {}
"""Classes without a specification, and why."""


def exported_classes() -> list[str]:
    """Names of the transformers, UNets and priors that diffusers exports."""
    import diffusers

    structure = [name for names in diffusers._import_structure.values() for name in names]
    kinds = ("Transformer", "UNet", "DiT", "UVit", "T5FilmDecoder", "DiffusionDecoder", "UniDiffuserModel")
    others = ("ControlNetModel", "Autoencoder", "Vae", "Pipeline", "Blocks")
    return sorted({n for n in structure if any(k in n for k in kinds) and not any(o in n for o in others)})


class Outcome(NamedTuple):
    """`difference`: the largest of any output to the model's, or None. `programs`: how many served. `freed`: the share
    of the weights that were released. `said`: the sentence of a refusal, or that the whole model serves."""

    difference: float | None
    programs: int
    freed: float
    said: str


def model_of(name: str) -> nn.Module:
    """The class at tiny size, with weights that are random and nowhere zero."""
    import diffusers

    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, name)(**EXPORTED[name].config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=0.2)
    return model


def calls_of(name: str, request: int) -> list[dict[str, Any]]:
    """A call at each of `TIMES`: the same request, other latents."""
    made = []
    for i, t in enumerate(TIMES):
        torch.manual_seed(request)
        call = EXPORTED[name].call(t)
        torch.manual_seed(10 * request + i)
        for argument, role in assign_roles(call, None).by_argument.items():
            if role == "live":
                call[argument] = torch.utils._pytree.tree_map(_another, call[argument])
        made.append(call)
    return made


def outcome(name: str) -> Outcome:
    """Two requests at each of `TIMES` through a sampler, compared with the model, then the bytes released."""
    model = model_of(name)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**EXPORTED[name].call(0.5))  # fails here if the specification is wrong
        try:
            sampler = optimize_sampler(model, len(TIMES), mode="eager")
            differences = [
                _difference(sampler(**call), model(**call)) for request in (1, 2) for call in calls_of(name, request)
            ]
        except (ValueError, RuntimeError) as refusal:
            return Outcome(None, 0, 0.0, _without_folders(str(refusal)))
    said = [str(w.message) for w in caught if "whole model serves" in str(w.message)]
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    programs = len(sampler.report.programs)
    freed = sampler.release_weights(to="drop") / total if programs and not said else 0.0
    return Outcome(max(differences), programs, freed, _without_folders(said[0]) if said else "")


def _without_folders(sentence: str) -> str:
    """Files by name alone: the folder is the machine's."""
    return re.sub(r"/\S*/(?=[^/\s]+\.py)", "", sentence)


def _another(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf + 0.1 * torch.randn_like(leaf)
    return leaf


def _difference(got: Any, expected: Any) -> float:
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if isinstance(a, Tensor))
