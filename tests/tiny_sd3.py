"""Seeded SD3 checkpoints of a few megabytes, made with diffusers' own classes and saved as a user would save them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 77  # CLIP's number of tokens
T5_TOKENS = 16
JOINT = 40  # width of the joined text: more than that of both CLIPs together
LAYERS = 3


@dataclass(frozen=True)
class Variant:
    """What differs between the checkpoints of the family."""

    qk_norm: str | None = None
    dual_attention_layers: tuple[int, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()


VARIANTS = {
    "sd3-medium": Variant(),
    "sd3.5-medium": Variant(
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
        defaults=(("skip_guidance_layers", [1]), ("skip_layer_guidance_stop", 0.8)),
    ),
    "sd3.5-large": Variant(qk_norm="rms_norm"),
    "sd3.5-large-turbo": Variant(
        qk_norm="rms_norm", defaults=(("guidance_scale", 1.0), ("num_inference_steps", 4))
    ),
}


def make_transformer(variant: str = "sd3-medium", layers: int = LAYERS) -> SD3Transformer2DModel:
    """The variant's network. The caller seeds torch."""
    facts = VARIANTS[variant]
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        qk_norm=facts.qk_norm,
        dual_attention_layers=facts.dual_attention_layers,
    ).eval()
    # Enlarge the modulations, so that an error in any of them changes the result.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_out.linear" in name or "norm1" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_vae() -> AutoencoderKL:
    """A VAE of SD3's form: 16 latent channels, 8 pixels per latent cell, no quant convolutions, a shift."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def make_pipeline(variant: str = "sd3-medium", *, t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """The pipeline in fp32 and eval mode; every call with one seed gives the same weights."""
    torch.manual_seed(seed)
    tokenizers = [make_clip_tokenizer(), make_clip_tokenizer(pad_token="!")]
    encoders = [
        make_clip(tokenizers[0], hidden_size=16, projection=8, layers=2, activation="quick_gelu"),
        make_clip(tokenizers[1], hidden_size=20, projection=12, layers=3, activation="gelu"),
    ]
    t5_tokenizer, t5_encoder = (make_t5_tokenizer(), make_t5()) if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=make_transformer(variant),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder,
        tokenizer_3=t5_tokenizer,
    )


def make_clip(
    tokenizer: CLIPTokenizer, *, hidden_size: int, projection: int, layers: int, activation: str
) -> CLIPTextModelWithProjection:
    """A CLIP with the end-of-text id of its tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=2.0,  # so that texts differ in more than the last digits
    )
    return CLIPTextModelWithProjection(config).eval()


def make_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Letters and a few merges; "!" has id 0, as in OpenAI's vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    assert vocabulary["!"] == 0
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=TOKENS)


def make_t5() -> T5EncoderModel:
    """A T5 v1.1 encoder: gated GELU, position bias in the first layer only."""
    config = T5Config(
        vocab_size=64,
        d_model=JOINT,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=12,  # below T5_TOKENS: every kind of bucket is used
        relative_attention_num_buckets=16,
    )
    return T5EncoderModel(config).eval()


def make_t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary of letters and a few words."""
    words = [f"\u2581{word}" for word in ("red", "cat", "a", "blue")]
    letters = [*"abcdefghijklmnopqrstuvwxyz", ",", ".", "\u2581"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -1.0) for word in words] + [(letter, -3.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def make_controlnet(*, text: bool, seed: int = 1) -> SD3ControlNetModel:
    """A ControlNet for make_transformer's networks, with residuals as large as the tokens.

    Args:
        text: the form of InstantX's for SD3-medium; without text, that of Stability's for SD3.5-large.
    """
    torch.manual_seed(seed)
    model = SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=JOINT if text else None,
        caption_projection_dim=32 if text else 64,  # Stability's is not the width either
        pooled_projection_dim=20,
        pos_embed_max_size=12 if text else None,
        qk_norm="rms_norm" if text else None,
        pos_embed_type="sincos" if text else None,
        use_pos_embed=text,
        force_zeros_for_pooled_projection=text,
    ).eval()
    with torch.no_grad():  # diffusers makes these layers with zeros, and so would change nothing
        for layer in (model.pos_embed_input.proj, *model.controlnet_blocks):
            layer.weight.copy_(0.2 * torch.randn_like(layer.weight))
            layer.bias.copy_(0.1 * torch.randn_like(layer.bias))
        for name, parameter in model.named_parameters():
            if "norm1" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_control_checkpoint(plain: Path, directory: Path, *, text: bool) -> Path:
    """A StableDiffusion3ControlNetPipeline: a plain checkpoint with another transformer, of 4 layers, and a ControlNet.

    The encoder's posterior gets a standard deviation of e^-15, because diffusers draws the sample for a control picture
    from torch's global generator, and ditc takes the mean.
    """
    shutil.copytree(plain, directory)
    torch.manual_seed(2)
    make_transformer("sd3.5-large", layers=4).save_pretrained(directory / "transformer")
    make_controlnet(text=text).save_pretrained(directory / "controlnet")
    vae = AutoencoderKL.from_pretrained(directory / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = -30
    vae.save_pretrained(directory / "vae")
    index = json.loads((directory / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusion3ControlNetPipeline"
    index["controlnet"] = ["diffusers", "SD3ControlNetModel"]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


def make_checkpoint(directory: Path, variant: str = "sd3-medium", *, t5: bool = True, seed: int = 0) -> Path:
    """Save the pipeline in diffusers layout with a ditc.json, and return the directory."""
    make_pipeline(variant, t5=t5, seed=seed).save_pretrained(directory, safe_serialization=True)
    defaults = {"max_sequence_length": T5_TOKENS, "num_inference_steps": 5, "guidance_scale": 3.0}
    defaults |= dict(VARIANTS[variant].defaults)
    (directory / "ditc.json").write_text(json.dumps(defaults) + "\n")
    return directory
