"""Tiny versions of released models, from their libraries, each with a loss and batches: a few thousand weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]

STEPS = 6
DROPOUT = 0.1
"""In every model whose configuration has dropout, so that the random numbers count too."""


class Released(NamedTuple):
    """A model in training mode, its loss, and `STEPS` batches."""

    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batches: list[Batch]


def _from(library: str, *names: str) -> list[Any]:
    """Classes of a library, whose own types a checker would take at their word."""
    module = importlib.import_module(library)
    return [getattr(module, name) for name in names]


def _tokens(*shape: int, vocabulary: int = 40) -> list[Batch]:
    source = torch.Generator().manual_seed(2)
    return [(torch.randint(3, vocabulary, shape, generator=source),) for _ in range(STEPS)]


def _normal(*shapes: tuple[int, ...]) -> list[Batch]:
    source = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(shape, generator=source) for shape in shapes) for _ in range(STEPS)]


def _next_token(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def gpt2(dropout: float) -> Released:
    GPT2Config, GPT2LMHeadModel = _from("transformers", "GPT2Config", "GPT2LMHeadModel")

    config = GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Released(GPT2LMHeadModel(config).train(), _next_token, _tokens(2, 8))


def llama(dropout: float) -> Released:
    """With ``gradient_checkpointing_enable()`` and, as in no release, dropout of the attention."""
    LlamaConfig, LlamaForCausalLM = _from("transformers", "LlamaConfig", "LlamaForCausalLM")

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    return Released(model, _next_token, _tokens(2, 8))


def t5(dropout: float) -> Released:
    T5Config, T5ForConditionalGeneration = _from("transformers", "T5Config", "T5ForConditionalGeneration")

    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,  # the base class takes it from **kwargs
    )
    return Released(T5ForConditionalGeneration(config).train(), _next_token, _tokens(2, 8))


def bert(dropout: float) -> Released:
    BertConfig, BertForMaskedLM = _from("transformers", "BertConfig", "BertForMaskedLM")

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Released(BertForMaskedLM(config).train(), _next_token, _tokens(2, 8))


def vit(dropout: float) -> Released:
    ViTConfig, ViTForImageClassification = _from("transformers", "ViTConfig", "ViTForImageClassification")

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=2,  # the base class takes it from **kwargs
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(pixel_values=x).logits, x[:, 0, 0, 0].gt(0).long())

    return Released(ViTForImageClassification(config).train(), loss_fn, _normal((4, 3, 8, 8)))


def mamba(dropout: float) -> Released:
    """It has no dropout."""
    MambaConfig, MambaForCausalLM = _from("transformers", "MambaConfig", "MambaForCausalLM")

    config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
    return Released(MambaForCausalLM(config).train(), _next_token, _tokens(2, 8))


def mixtral(dropout: float) -> Released:
    MixtralConfig, MixtralForCausalLM = _from("transformers", "MixtralConfig", "MixtralForCausalLM")

    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        attention_dropout=dropout,
        use_cache=False,
    )
    return Released(MixtralForCausalLM(config).train(), _next_token, _tokens(2, 8))


def unet(dropout: float) -> Released:
    DDPMScheduler, UNet2DModel = _from("diffusers", "DDPMScheduler", "UNet2DModel")

    model: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=dropout,
    )
    scheduler: Any = DDPMScheduler(num_train_timesteps=10)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(10, (len(x),))
        return F.mse_loss(model(scheduler.add_noise(x, noise, t), t).sample, noise)

    return Released(model.train(), loss_fn, _normal((2, 1, 8, 8)))


def conditioned_unet(dropout: float) -> Released:
    """Stable Diffusion's recipe: checkpointing, and beside it a frozen VAE and a frozen CLIP text model."""
    AutoencoderKL, DDPMScheduler, UNet2DConditionModel = _from(
        "diffusers", "AutoencoderKL", "DDPMScheduler", "UNet2DConditionModel"
    )
    CLIPTextConfig, CLIPTextModel = _from("transformers", "CLIPTextConfig", "CLIPTextModel")

    model: Any = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        dropout=dropout,
    )
    model.train().enable_gradient_checkpointing()
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            eos_token_id=2,
            projection_dim=16,
        )
    ).eval()
    vae.eval().requires_grad_(False)
    text.requires_grad_(False)
    scheduler: Any = DDPMScheduler(num_train_timesteps=10)

    def loss_fn(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            states = text(tokens)[0]
        noise, t = torch.randn_like(latents), torch.randint(10, (len(latents),))
        return F.mse_loss(model(scheduler.add_noise(latents, noise, t), t, states).sample, noise)

    images = _normal((2, 3, 16, 16))
    return Released(model, loss_fn, [(x, t) for (x,), (t,) in zip(images, _tokens(2, 6), strict=True)])


def _flux(adapter: Any) -> Released:
    (FluxTransformer2DModel,) = _from("diffusers", "FluxTransformer2DModel")

    model: Any = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    model.train().requires_grad_(False)
    model.add_adapter(adapter)
    places, texts = torch.zeros(16, 3), torch.zeros(6, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4

    def loss_fn(model: nn.Module, x: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.rand(len(x))
        noisy = (1 - t[:, None, None]) * x + t[:, None, None] * noise
        guidance = torch.full((len(x),), 3.5)
        out = model(noisy, text, pooled, t, places, texts, guidance, return_dict=False)[0]
        return F.mse_loss(out, noise - x)

    return Released(model, loss_fn, _normal((2, 16, 4), (2, 6, 12), (2, 10)))


def flux_lora(dropout: float) -> Released:
    (LoraConfig,) = _from("peft", "LoraConfig")

    return _flux(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], lora_dropout=dropout, init_lora_weights=False)
    )


def flux_dora(dropout: float) -> Released:
    (LoraConfig,) = _from("peft", "LoraConfig")

    return _flux(LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True, init_lora_weights=False))


class FourBitLinear(nn.Module):
    """Frozen weights as pairs of 4-bit codes in bytes, with a scale for each row, and a trained low-rank addition."""

    scale: Tensor
    packed: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) * inputs**-0.5
        scale = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / scale).round().clamp(-8, 7).to(torch.int8) + 8
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8))
        self.down, self.up = nn.Parameter(torch.randn(rank, inputs) * 0.1), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten(1)
        weight = (codes.to(x.dtype) - 8) * self.scale
        return F.linear(x, weight) + x @ self.down.T @ self.up.T


def _rows_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def four_bit(dropout: float) -> Released:
    model = nn.Sequential(FourBitLinear(8, 16), nn.SiLU(), nn.Dropout(dropout), FourBitLinear(16, 4))
    return Released(model.train(), _rows_loss, _normal((8, 8), (8, 4)))


def int8(dropout: float) -> Released:
    """torchao's int8 weights, frozen, under peft's LoRA."""
    quantize_, Int8WeightOnlyConfig = _from("torchao.quantization", "quantize_", "Int8WeightOnlyConfig")
    LoraConfig, inject_adapter_in_model = _from("peft", "LoraConfig", "inject_adapter_in_model")

    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    quantize_(model, Int8WeightOnlyConfig())
    lora = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False)
    return Released(inject_adapter_in_model(lora, model).train(), _rows_loss, _normal((8, 8), (8, 4)))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], dropout: float) -> None:
        super().__init__()
        self.body = kind(4, 8, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def lstm(dropout: float) -> Released:
    return Released(_Recurrent(nn.LSTM, dropout).train(), _rows_loss, _normal((8, 5, 4), (8, 2)))


def gru(dropout: float) -> Released:
    return Released(_Recurrent(nn.GRU, dropout).train(), _rows_loss, _normal((8, 5, 4), (8, 2)))


def whisper(dropout: float) -> Released:
    WhisperConfig, WhisperForConditionalGeneration = _from(
        "transformers", "WhisperConfig", "WhisperForConditionalGeneration"
    )

    config = WhisperConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        decoder_start_token_id=1,
        encoder_layerdrop=0.1,
        dropout=dropout,
    )

    def loss_fn(model: nn.Module, sound: Tensor, tokens: Tensor) -> Tensor:
        return model(input_features=sound, labels=tokens).loss

    sounds = _normal((2, 8, 32))
    batches: list[Batch] = [(x, t) for (x,), (t,) in zip(sounds, _tokens(2, 6), strict=True)]
    return Released(WhisperForConditionalGeneration(config).train(), loss_fn, batches)


def wav2vec2(dropout: float) -> Released:
    Wav2Vec2Config, Wav2Vec2Model = _from("transformers", "Wav2Vec2Config", "Wav2Vec2Model")

    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,  # the base class takes it from **kwargs
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )

    def loss_fn(model: nn.Module, sound: Tensor) -> Tensor:
        return model(sound).last_hidden_state.square().mean()

    return Released(Wav2Vec2Model(config).train(), loss_fn, _normal((2, 400)))


def wav2vec2_conformer(dropout: float) -> Released:
    """Its rotary table is kept in an attribute, which the first forward fills."""
    Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel = _from(
        "transformers", "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel"
    )

    config = Wav2Vec2ConformerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=dropout,
        position_embeddings_type="rotary",
    )

    def loss_fn(model: nn.Module, sound: Tensor) -> Tensor:
        return model(sound).last_hidden_state.square().mean()

    model = Wav2Vec2ConformerModel(config).train()
    model.encoder.pos_conv_embed.requires_grad_(False)  # unread: it would decay, and torch.optim leaves it alone
    return Released(model, loss_fn, _normal((2, 400)))


RELEASED: dict[str, Callable[[float], Released]] = {
    "GPT-2": gpt2,
    "Llama, checkpointed": llama,
    "T5": t5,
    "BERT": bert,
    "ViT": vit,
    "Mamba": mamba,
    "Wav2Vec2-Conformer": wav2vec2_conformer,
    "Mixtral": mixtral,
    "UNet": unet,
    "UNet with conditions, checkpointed": conditioned_unet,
    "Flux with LoRA": flux_lora,
    "Flux with DoRA": flux_dora,
    "4-bit base with LoRA": four_bit,
    "int8 base with LoRA": int8,
    "LSTM": lstm,
    "GRU": gru,
}
READS_THE_HOST = {"Whisper": whisper, "Wav2Vec2": wav2vec2}
