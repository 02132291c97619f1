"""Models from their libraries are rehearsed without a false alarm, and are as they were afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._capture.rehearsal.contents import Contents
from tests.capture.small_programs import Loss, kinds, rehearsed

Case = tuple[nn.Module, Loss, tuple[Tensor, ...]]


def _tokens() -> tuple[Tensor]:
    return (torch.arange(16).view(2, 8) + 3,)


def _language_loss(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def llama_with_checkpointing() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, use_cache=False, **sizes)).train()
    model.gradient_checkpointing_enable()
    return model, _language_loss, _tokens()


def flux_with_lora() -> Case:
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    model: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 4, 8), **sizes
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], lora_dropout=0.1))

    def loss(model: Any, x: Tensor, prompt: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
        out = model(hidden_states=x, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=t, **ids)
        return F.mse_loss(out.sample, x)

    batch = torch.randn(2, 4, 4), torch.randn(2, 3, 16), torch.randn(2, 16), torch.rand(2)
    return model.train(), loss, batch


def unet_with_frozen_vae() -> Case:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    model: Any = UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    model.train().enable_gradient_checkpointing()
    vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.requires_grad_(False)
    scheduler: Any = DDPMScheduler()

    def loss(model: Any, image: Tensor, prompt: Tensor, t: Tensor) -> Tensor:
        latent = vae.encode(image).latent_dist.sample()
        noise = torch.randn_like(latent)
        return F.mse_loss(model(scheduler.add_noise(latent, noise, t), t, prompt).sample, noise)

    return model, loss, (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8), torch.tensor([3, 50]))


CASES: list[tuple[Callable[[], Case], bool]] = [
    (llama_with_checkpointing, False),
    (flux_with_lora, True),
    (unet_with_frozen_vae, True),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own
@pytest.mark.parametrize(("make", "draws"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_nothing_is_left_behind(make: Callable[[], Case], draws: bool) -> None:
    model, loss, data = make()
    before = Contents({"model": model, "loss_fn": loss})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rehearsal = rehearsed(model, loss, data)
    assert kinds(rehearsal) == {} and rehearsal.not_looked_into == () and rehearsal.not_put_back == ()
    assert rehearsal.drew_random is draws
    assert before.changes() == [] and before.moved_generators() == []
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])] == []
