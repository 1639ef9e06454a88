"""A seeded SANA-Video checkpoint of a few hundred kilobytes, made with diffusers' classes as a user would save it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import Gemma2Model

from tests.tiny_sana import make_text_encoder, make_tokenizer


def make_pipeline(seed: int = 0) -> SanaVideoPipeline:
    """The pipeline in fp32 and eval mode; every call with one seed gives the same weights.

    The scheduler is the one that SanaVideoPipeline names, with the shift of NVlabs/Sana's command lines for videos.
    """
    torch.manual_seed(seed)
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        mlp_ratio=3.0,
    )
    vae = AutoencoderKLWan(  # with the frames per latent frame of the released one, and half of its pixels
        base_dim=4,
        num_res_blocks=1,
        dim_mult=[1, 1, 1],
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
    )
    text_encoder: Gemma2Model = make_text_encoder()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=8.0,
        algorithm_type="dpmsolver++",
    )
    return SanaVideoPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def make_checkpoint(directory: Path, seed: int = 0) -> Path:
    """Save the pipeline in diffusers layout with a ditc.json, and return the directory."""
    make_pipeline(seed).save_pretrained(directory, safe_serialization=True)
    (directory / "ditc.json").write_text(
        '{"height": 32, "width": 64, "frames": 9, "fps": 8, "resolution_bins": null, "max_sequence_length": 12, '
        '"complex_human_instruction": null, "num_inference_steps": 4, "guidance_scale": 3.0}\n'
    )
    return directory


def make_ltx2_checkpoint(directory: Path, of: Path, seed: int = 0) -> Path:
    """The checkpoint `of` of `make_checkpoint` with LTX-2's kind of autoencoder, which is not causal in time.

    Its latents have the channels and sizes of the other one, so the transformer is the same.
    """
    shutil.copytree(of, directory, ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(seed)
    vae = AutoencoderKLLTX2Video(
        latent_channels=16,
        block_out_channels=[16, 32],
        down_block_types=["LTX2VideoDownBlock3D"] * 2,
        decoder_block_out_channels=[16, 32],
        layers_per_block=[1, 1, 1],
        decoder_layers_per_block=[1, 1, 1],
        spatio_temporal_scaling=[True, True],
        decoder_spatio_temporal_scaling=[True, True],
        decoder_inject_noise=[False, False, False],
        downsample_type=["temporal", "spatiotemporal"],
        upsample_type=["spatiotemporal", "temporal"],
        upsample_residual=[True, True],
        upsample_factor=[2, 2],
        patch_size=2,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    with torch.no_grad():
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 1.5)
    vae.save_pretrained(directory / "vae", safe_serialization=True)
    index = json.loads((directory / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLLTX2Video"]
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory
