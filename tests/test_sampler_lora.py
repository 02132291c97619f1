"""Adapters of peft and attention processors of diffusers on a model that has a sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.sampler import Sampler, optimize_sampler
from tests.small_denoiser import Counter, Denoiser, X, Y, denoiser, exactly

peft = pytest.importorskip("peft")

TIMES = (8.0, 7.0, 6.0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the sampler is built again"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]


def served(sampler: Sampler) -> bool:
    return all(exactly(sampler, t) for t in TIMES)


def out(sampler: Sampler) -> Tensor:
    got: Tensor = sampler(X, torch.full((2,), 8.0), Y)
    return got


def inject(model: nn.Module, target: str, name: str = "a") -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[target], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    model.eval()


def layer(model: Denoiser, target: str) -> Any:
    return getattr(model, target)


@pytest.mark.parametrize("target", ["time", "out"], ids=["the table's", "the body's"])
def test_an_adapter_is_followed_from_injection_to_unloading(target: str) -> None:
    model = denoiser()
    sampler = optimize_sampler(model, 3, mode="eager")
    assert served(sampler)
    seen = [out(sampler)]

    def step(act: Callable[[], object]) -> None:
        act()
        assert served(sampler) and not torch.equal(seen[-1], out(sampler))
        seen.append(out(sampler))

    step(lambda: inject(model, target))
    lora = layer(model, target)
    step(lambda: lora.set_scale("a", 0.5))
    step(lambda: lora.scale_layer(3.0))
    step(lambda: lora.unscale_layer(3.0))
    step(lambda: inject(model, target, "b"))  # which makes it the active one
    step(lambda: lora.set_adapter(["a", "b"]))
    step(lambda: lora.set_adapter("a"))
    step(lambda: lora.enable_adapters(False))
    assert torch.equal(seen[0], seen[-1])
    step(lambda: lora.enable_adapters(True))
    lora.merge()
    assert served(sampler)
    lora.unmerge()
    assert served(sampler)
    step(lambda: setattr(model, target, lora.get_base_layer()))


def test_training_an_adapter_of_the_body_computes_no_table_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = denoiser()
    inject(model, "out")
    sampler = optimize_sampler(model, 3, mode="eager")
    assert served(sampler)
    counter = Counter(sampler, monkeypatch)
    with torch.no_grad():
        layer(model, "out").lora_A["a"].weight.mul_(3)
    assert served(sampler) and counter.taken() == {}
    inject(model, "time")
    assert served(sampler)
    counter = Counter(sampler, monkeypatch)
    with torch.no_grad():
        layer(model, "time").lora_A["a"].weight.mul_(3)
    assert served(sampler) and counter.taken() == {"STEP": 3, "STEP_REQUEST": 3}


def test_an_adapter_on_dropped_weights_is_refused_until_they_are_restored() -> None:
    model = denoiser()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    sampler = optimize_sampler(model, 3, mode="eager")
    assert served(sampler)
    sampler.release_weights(to="drop")
    inject(model, "out")
    with pytest.raises(RuntimeError, match="building the sampler again needs weights"):
        out(sampler)
    sampler.restore_weights(state)
    assert served(sampler)


def tiny_flux() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[2, 2, 4],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    flux: nn.Module = model.eval()
    return flux


def test_adapters_and_processors_of_a_diffusers_transformer_are_followed() -> None:
    model: Any = tiny_flux()
    arguments = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    sampler = optimize_sampler(model, 2, mode="eager")

    def check(**more: Any) -> Tensor:
        call = {**arguments, "timestep": torch.full((1,), 0.5), **more}
        with torch.no_grad():
            expected = model(**call).sample
            got: Tensor = sampler(**call).sample
        assert torch.equal(got, expected)
        return got

    plain = check()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "norm1.linear"], init_lora_weights=False)
    sampler.add_adapter(config, adapter_name="style")  # through the stand-in
    model.eval()
    adapted = check()
    assert not torch.equal(plain, adapted)
    assert not torch.equal(check(joint_attention_kwargs={"scale": 2.0}), adapted)
    sampler.unload_lora()
    assert torch.equal(check(), plain)

    class Doubled(type(model.transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(attn, 2 * hidden_states, *args, **kwargs)

    model.set_attn_processor(Doubled())
    assert not torch.equal(check(), plain)
