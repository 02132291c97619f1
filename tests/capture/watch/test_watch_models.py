"""Released models that train on other batches are not changed: no false alarm, and nothing is compared twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._capture.watch.reads import reading
from fusion_compile._capture.watch.watch import Watch

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

Case = tuple[nn.Module, Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def token_ids() -> tuple[Tensor, ...]:
    return (torch.randint(3, 40, (2, 8)),)


def llama() -> Case:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).train(), language_loss, token_ids


def llama_checkpointed() -> Case:
    model, loss, batch = llama()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model, loss, batch


def llama_with_lora() -> Case:
    model, loss, batch = llama()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.1)
    return peft.get_peft_model(model, config), loss, batch


def gpt2() -> Case:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).train(), language_loss, token_ids


def bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertForMaskedLM(config).train(), language_loss, token_ids


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
    )
    loss = lambda model, x, y: model(pixel_values=x, labels=y).loss  # noqa: E731
    batch = lambda: (torch.randn(2, 3, 16, 16), torch.randint(0, 2, (2,)))  # noqa: E731
    return transformers.ViTForImageClassification(config).train(), loss, batch


def unet() -> Case:
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    scheduler = diffusers.DDPMScheduler(50)

    def loss(model: nn.Module, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(model(scheduler.add_noise(x, noise, t), t).sample, noise)

    shape = (2, 3, 16, 16)
    return model.train(), loss, lambda: (torch.randn(shape), torch.randn(shape), torch.randint(0, 50, (2,)))


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )

    def loss(model: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return F.mse_loss(model(x, timestep=t, class_labels=label).sample[:, :4], x)

    return model.train(), loss, lambda: (torch.randn(2, 4, 8, 8), torch.randint(0, 50, (2,)), torch.ones(2).long())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the libraries' own calls
@pytest.mark.parametrize(
    "make", [llama, llama_checkpointed, llama_with_lora, gpt2, bert, vit, unet, dit], ids=lambda make: make.__name__
)
def test_training_changes_nothing_that_is_watched(make: Callable[[], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batch = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss(model, *batch()).backward()  # lazy caches fill
    with reading() as reads:
        loss(model, *batch()).backward()
    watch = Watch({"model": model, "loss": loss}, reads)
    rounds: list[Any] = []
    monkeypatch.setattr(watch, "remember", lambda: rounds.append(1))
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, *batch()).backward()
        optimizer.step()
        assert [watch.changed() for _ in range(watch.turns)] == [None] * watch.turns
    assert rounds == []
