"""A lucidrains/mmdit checkpoint in PyTorch: the mmdit package's trunk with diffusers' embeddings, scheduler and VAE.

This reference shares no network code with ditc. It is called in the same way as diffusers' text-to-image pipelines.
"""

# B samples, C latent channels, H/W latent size, h/w patches per side, S text tokens, D width

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from torch import Tensor, nn
from transformers import Gemma2Model, T5EncoderModel

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.checkpoint.tokenizer import load_tokenizer
from ditc.parity.reference.rewritten import rewritten_networks

MODULES = {"MMDiT": "mmdit.mmdit_pytorch", "GeneralizedMMDiT": "mmdit.mmdit_generalized_pytorch"}
SCHEDULERS = {
    cls.__name__: cls
    for cls in (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
    )
}
AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderDC, AutoencoderKL)}
TEXT_ENCODERS = {cls.config_class.model_type: cls for cls in (Gemma2Model, T5EncoderModel)}
SINUSOID_WIDTH = 256


@dataclass(frozen=True)
class Output:
    """The return value of a diffusers pipeline, as far as parity reads it."""

    images: Any


class Transformer(nn.Module):
    """The package's MMDiT, between a patch embedding and a Linear that maps tokens back to patches.

    Args:
        config: the contents of transformer/config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        arguments = dict(config["trunk"])
        self.generalized = config["trunk_class"] == "GeneralizedMMDiT"
        self.skip_last = arguments.pop("should_skip_last_feedforward", True)
        dims = arguments.get("dim_modalities") or (arguments["dim_text"], arguments["dim_image"])
        module = importlib.import_module(MODULES[config["trunk_class"]])
        self.patch_size, self.width = config["patch_size"], dims[1]
        self.base_size = config["sample_size"] // self.patch_size
        self.interpolation_scale = config.get("interpolation_scale", 1.0)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(config["in_channels"], dims[1], self.patch_size, stride=self.patch_size)}
        )
        self.time_proj = Timesteps(SINUSOID_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(SINUSOID_WIDTH, arguments["dim_cond"])
        self.context_embedder = nn.Linear(config["caption_channels"], dims[0])
        self.trunk = module.MMDiT(**arguments)
        self.proj_out = nn.Linear(dims[1], self.patch_size**2 * config["out_channels"])

    def forward(self, latents: Tensor, timestep: Tensor, text_embeds: Tensor, text_mask: Tensor) -> Tensor:
        """Predict the velocity (B,C,H,W).

        Args:
            latents: (B,C,H,W).
            timestep: (B,).
            text_embeds: (B,S,C).
            text_mask: (B,S) bool.
        """
        patches_BDhw = self.patch_embed["proj"](latents)
        height, width = patches_BDhw.shape[2:]
        position = get_2d_sincos_pos_embed(
            self.width,
            (height, width),
            base_size=self.base_size,
            interpolation_scale=self.interpolation_scale,
            output_type="pt",
        )
        image = patches_BDhw.flatten(2).transpose(1, 2) + position.float()
        time = self.time_embed(self.time_proj(timestep))
        text = self.context_embedder(text_embeds)
        if self.generalized:
            _, image = self.trunk(
                modality_tokens=(text, image), modality_masks=(text_mask, None), time_cond=time
            )
        else:
            _, image = self.trunk(
                text_tokens=text,
                image_tokens=image,
                text_mask=text_mask,
                time_cond=time,
                should_skip_last_feedforward=self.skip_last,
            )
        out = self.proj_out(image).unflatten(2, (self.patch_size, self.patch_size, -1))
        out = out.unflatten(1, (height, width))
        return torch.einsum("bhwpqc->bchpwq", out).flatten(4, 5).flatten(2, 3)


class Pipeline:
    """Text to picture, with classifier-free guidance on rows in diffusers' order: negative, then positive."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = dict(components)
        self.transformer, self.text_encoder = components["transformer"], components["text_encoder"]
        self.tokenizer, self.vae, self.scheduler = (
            components[name] for name in ("tokenizer", "vae", "scheduler")
        )

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Do nothing: this pipeline has no progress bar."""

    def __call__(
        self,
        *,
        prompt: str,
        negative_prompt: str = "",
        latents: Tensor,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        max_sequence_length: int = 300,
        output_type: str = "np",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Output:
        """Draw from the starting noise `latents` (B,C,H,W): pictures (B,H,W,3) in [0,1], or the last latents."""
        guided = guidance_scale > 1
        texts = [negative_prompt, prompt] if guided else [prompt]
        embeds, mask = self.encode_prompt(texts, max_sequence_length)
        embeds, mask = (x.repeat_interleave(len(latents), 0) for x in (embeds, mask))
        self.scheduler.set_timesteps(num_inference_steps)
        for index, timestep in enumerate(self.scheduler.timesteps):
            rows = torch.cat([latents] * len(texts))
            velocity = self.transformer(rows, timestep.expand(len(rows)).to(rows.dtype), embeds, mask)
            if guided:
                negative, positive = velocity.chunk(2)
                velocity = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, index, timestep, {"latents": latents})
                latents = changed.get("latents", latents)
        if output_type == "latent":
            return Output(latents)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor + shift, return_dict=False)[0]
        return Output((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy())

    def encode_prompt(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """The last hidden states (B,S,C) and the mask (B,S) bool. Texts are padded on the right to `length` tokens."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states, tokens.attention_mask.bool()


def open_pipeline(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Open the checkpoint with upstream's modules. A missing or unknown tensor is an error."""
    path = Path(checkpoint.path)
    transformer = checkpoint.component("transformer")
    network = Transformer(transformer.config).eval().requires_grad_(False)
    network.load_state_dict({name: transformer.tensors[name] for name in transformer.tensors})
    scheduler = SCHEDULERS[checkpoint.scheduler_config["_class_name"]]
    encoder = TEXT_ENCODERS[checkpoint.component("text_encoder").config["model_type"]]
    vae = AUTOENCODERS[checkpoint.component("vae").config["_class_name"]]
    rewritten = rewritten_networks(checkpoint, dtype)
    return Pipeline(
        {
            "transformer": network.to(dtype),
            "text_encoder": rewritten.get("text_encoder")
            or encoder.from_pretrained(path / "text_encoder", dtype=dtype).eval(),
            "tokenizer": load_tokenizer(checkpoint, "tokenizer"),
            "vae": rewritten.get("vae") or vae.from_pretrained(path / "vae", torch_dtype=dtype).eval(),
            "scheduler": scheduler.from_pretrained(path / "scheduler"),
        }
    )
