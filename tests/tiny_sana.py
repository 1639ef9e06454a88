"""A seeded Sana checkpoint of a few hundred kilobytes, made with diffusers' classes and saved as a user would do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

# The block of make_pag_checkpoint whose self-attention is perturbed.
PAG_LAYER = "transformer_blocks.1"
DEFAULTS = (
    '{"height": 64, "width": 64, "resolution_bins": null, "max_sequence_length": 12, '
    '"complex_human_instruction": null, "num_inference_steps": 4, "guidance_scale": 3.0}\n'
)


def make_pipeline(
    seed: int = 0,
    *,
    qk_norm: str | None = "rms_norm_across_heads",
    sprint: bool = False,
    layers: int = 2,
) -> SanaPipeline | SanaSprintPipeline:
    """The pipeline in fp32 and eval mode; every call with one seed gives the same weights."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=4,
        qk_norm=qk_norm,
        guidance_embeds=sprint,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.7,
    )
    # This VAE halves the picture only once, but SanaPipeline still requires sizes that are multiples of 32.
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        algorithm_type="dpmsolver++",
    )
    pipeline = SanaSprintPipeline if sprint else SanaPipeline
    return pipeline(
        tokenizer=make_tokenizer(),
        text_encoder=make_text_encoder().eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=SCMScheduler() if sprint else scheduler,
    )


def make_text_encoder() -> Gemma2Model:
    """A Gemma-2 with two layers, whose states have 24 channels."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=512,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=16,
        )
    )


def make_tokenizer() -> GemmaTokenizer:
    """A tokenizer of bytes that puts <bos> in front, as Gemma's does."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, "\u2581", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return GemmaTokenizer(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def make_checkpoint(directory: Path, seed: int = 0, *, qk_norm: str | None = "rms_norm_across_heads") -> Path:
    """Save the pipeline in diffusers layout with a ditc.json, and return the directory."""
    make_pipeline(seed, qk_norm=qk_norm).save_pretrained(directory, safe_serialization=True)
    (directory / "ditc.json").write_text(DEFAULTS)
    return directory


def make_controlnet(seed: int = 1) -> SanaControlNetModel:
    """A ControlNet for the transformer of make_pipeline, with residuals as large as the tokens."""
    torch.manual_seed(seed)
    model = SanaControlNetModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=4,
    ).eval()
    with torch.no_grad():  # diffusers makes these layers with zeros, and so would change nothing
        for layer in (model.input_block, *model.controlnet_blocks):
            layer.weight.copy_(0.3 * torch.randn_like(layer.weight))
            layer.bias.copy_(0.1 * torch.randn_like(layer.bias))
    return model


def make_control_checkpoint(plain: Path, directory: Path) -> Path:
    """A SanaControlNetPipeline: a plain checkpoint with another transformer, of 3 layers, and a ControlNet of 2."""
    shutil.copytree(plain, directory)
    make_pipeline(layers=3).transformer.save_pretrained(directory / "transformer")
    make_controlnet().save_pretrained(directory / "controlnet")
    index = json.loads((directory / "model_index.json").read_text())
    index["_class_name"] = "SanaControlNetPipeline"
    index["controlnet"] = ["diffusers", "SanaControlNetModel"]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


def make_pag_checkpoint(directory: Path, seed: int = 0, *, qk_norm: str | None = None) -> Path:
    """A checkpoint that names SanaPAGPipeline, whose second block has perturbed attention.

    It has no qk-norm unless asked for: diffusers leaves it out in perturbed blocks.
    """
    parts = make_pipeline(seed, qk_norm=qk_norm).components
    SanaPAGPipeline(**parts, pag_applied_layers=PAG_LAYER).save_pretrained(directory)
    (directory / "ditc.json").write_text(
        '{"height": 64, "width": 64, "resolution_bins": null, "max_sequence_length": 12, '
        '"complex_human_instruction": null, "num_inference_steps": 4, "guidance_scale": 3.0, '
        f'"pag_applied_layers": "{PAG_LAYER}"}}\n'
    )
    return directory


def make_sprint_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A SANA-Sprint checkpoint: SanaSprintPipeline with a transformer that embeds the guidance scale."""
    make_pipeline(seed, sprint=True).save_pretrained(directory, safe_serialization=True)
    (directory / "ditc.json").write_text(
        '{"height": 64, "width": 64, "resolution_bins": null, "max_sequence_length": 12, '
        '"complex_human_instruction": null}\n'
    )
    return directory
