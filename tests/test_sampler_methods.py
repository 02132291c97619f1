"""Other methods than forward, the model's class, a pipeline that is saved, and what the table holds of the weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusion_compile as fc
from tests.models.published_style import PublishedDiT

TIMES = (900.0, 500.0, 100.0)
X, Y = torch.linspace(-1, 1, 16).reshape(4, 4), torch.tensor([1, 2, 0, 0])


class Guided(nn.Module):
    """``forward_with_cfg`` of DiT, ``apply_model`` of latent diffusion, and one method that computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.time, self.label = nn.Linear(4, 4), nn.Linear(1, 4), nn.Embedding(3, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        scaled: Tensor = self.out(x) * self.time(t[:, None]) + self.label(y)
        return scaled

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        cond, uncond = self.forward(torch.cat([half, half]), t, y).chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided, guided])

    def guided_twice(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self(x, t, y) + self(x, t, y)

    def apply_model(self, x: Tensor, t: Tensor) -> Any:
        return self.out(x) * self.time(t[:, None])

    def patchify(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def at(t: float, n: int = 4) -> Tensor:
    return torch.full((n,), t)


def guided() -> Guided:
    return Guided().eval().requires_grad_(False)


def test_another_method_is_hoisted_under_its_name() -> None:
    model = guided()
    sampler = fc.optimize_sampler(model, 3, mode="eager", method="forward_with_cfg")
    for t in TIMES:
        expected = model.forward_with_cfg(X, at(t), Y, 4.0)
        assert torch.equal(sampler(X, at(t), Y, 4.0), expected)
        assert torch.equal(sampler.forward_with_cfg(X, at(t), Y, cfg_scale=4.0), expected)
    assert sampler.release_weights(to="drop") == 4 * (4 + 4 + 12)  # the time's layer and the labels
    assert torch.equal(sampler.forward_with_cfg(X, at(t), Y, 4.0), expected)


def test_published_code_samples_through_its_method() -> None:
    model = PublishedDiT().eval().requires_grad_(False)
    sampler = fc.optimize_sampler(model, 3, mode="eager", method="forward_with_cfg")
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    for t in (900, 500):
        call = (x, torch.full((2,), t), y, 1.5)
        assert torch.equal(sampler.forward_with_cfg(*call), model.forward_with_cfg(*call))


@pytest.mark.parametrize("name", ["forward_with_cfg", "guided_twice", "apply_model"])
def test_a_method_that_runs_unhoisted_says_so_once(name: str) -> None:
    model = guided()
    sampler = fc.optimize_sampler(model, 3, mode="eager")
    request = {"forward_with_cfg": (Y, 4.0), "guided_twice": (Y,), "apply_model": ()}[name]
    with pytest.warns(UserWarning, match=rf"Guided\.{name} is the model's own .*method='{name}'\)"):
        got = getattr(sampler, name)(X, at(500.0), *request)
    assert torch.equal(got, getattr(model, name)(X, at(500.0), *request))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(sampler, name)(X, at(500.0), *request)
        sampler.patchify(X)


def test_a_method_that_is_not_there_is_refused() -> None:
    for method in ("denoise", "out.weight", 3):
        with pytest.raises(ValueError, match="is no method of Guided"):
            fc.optimize_sampler(guided(), 3, method=method)  # type: ignore[arg-type]


def test_a_copy_keeps_the_method() -> None:
    sampler = copy.deepcopy(fc.optimize_sampler(guided(), 3, mode="eager", method="forward_with_cfg"))
    call = (X, at(500.0), Y, 4.0)
    model: Any = sampler.model
    assert torch.equal(sampler.forward_with_cfg(*call), model.forward_with_cfg(*call))


def test_it_is_of_the_models_class_for_code_that_asks() -> None:
    sampler: object = fc.optimize_sampler(guided(), 3)
    assert isinstance(sampler, Guided) and isinstance(sampler, fc.Sampler) and type(sampler) is fc.Sampler
    assert sampler.__module__ == Guided.__module__ and repr(sampler).startswith("Sampler(")


def test_a_pipeline_that_is_saved_writes_the_transformer(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=1,
        sample_size=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipeline = diffusers.DiTPipeline(model, vae.eval(), diffusers.DDIMScheduler())
    pipeline.transformer = fc.optimize_sampler(model, 2, mode="eager")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path).transformer
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


class Normalised(nn.Module):
    """EDM2 normalises every weight in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.time = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1)) * (self.time * t[:, None]).sin()


def test_what_the_table_holds_of_the_weights_is_not_counted_as_given_back() -> None:
    model = Normalised().eval().requires_grad_(False)
    x = torch.randn(4, 64)
    expected = model(x, at(0.5))
    sampler = fc.optimize_sampler(model, 3, mode="eager", example_inputs=(x, at(0.5)))
    assert torch.equal(sampler(x, at(0.5)), expected)
    assert sampler.release_weights(to="drop") == 4 * 64  # the time's; the table holds as much as the other weight
    assert sampler.report.programs[0].released == 4 * 64
    assert torch.equal(sampler(x, at(0.5)), expected)
