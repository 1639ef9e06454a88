"""Read a native SD3 file of Stability: prefixes separate its networks, and names and shapes give their configs.

    model.diffusion_model.*           the transformer; it has no prefix in a file that holds nothing else
    first_stage_model.* or vae.*      the autoencoder
    text_encoders.NAME.transformer.*  clip_l, clip_g and t5xxl, if the file includes them

Source: Stability-AI/sd3.5, sd3_infer.py and sd3_impls.py, which read the same facts from the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert import kl_keys
from ditc.export.families.sd3 import keys as sd3_keys
from ditc.export.families.sd3.keys import Sd3Keys
from ditc.runtime.errors import CheckpointError

TRANSFORMER, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {
    "transformer": (TRANSFORMER,),
    "vae": (VAE, "vae."),
    "text_encoder": ("text_encoders.clip_l.transformer.",),
    "text_encoder_2": ("text_encoders.clip_g.transformer.",),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}
# Tensors in such files that no network reads: CLIP's training temperature, a buffer of 0, 1, 2, ..., and a copy of T5's
# embedding under the encoder's name.
UNREAD = (".logit_scale", ".embeddings.position_ids", ".encoder.embed_tokens.weight")
BLOCK_0 = "joint_blocks.0.x_block.attn.qkv.weight"

# The head size of every MMDiT that Stability released (sd3_impls.py: depth = width // 64, heads = depth).
HEAD_DIM = 64
PIXELS_PER_LATENT = 8
GROUPS = 32  # groups of every norm in the autoencoder (sd3_impls.py, Normalize)
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609  # sd3_impls.py, SD3LatentFormat
ACTIVATIONS = {
    "text_encoder": "quick_gelu",
    "text_encoder_2": "gelu",
}  # sd3_infer.py, CLIPL_CONFIG, CLIPG_CONFIG
CLIP_HEAD_DIM = 64


def is_stability(tensors: Iterable[str]) -> bool:
    """Whether the names are those of an SD3 network in Stability's layout."""
    names = set(tensors)
    return BLOCK_0 in names or TRANSFORMER + BLOCK_0 in names


def sections(native: TensorSource) -> dict[str, TensorSource]:
    """Divide the file's tensors among their components, with the prefixes removed from their names.

    Raises:
        CheckpointError: a tensor belongs to no known component.
    """
    found: dict[str, dict[str, TensorEntry]] = {}
    unknown = []
    for name in native:
        if name.endswith(UNREAD):
            continue
        component, short = _component_of(name, bare=TRANSFORMER + BLOCK_0 not in native)
        if component is None:
            unknown.append(name)
        else:
            found.setdefault(component, {})[short] = native.entry(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors belong to no known network: {', '.join(unknown[:4])}",
            hint=f"known prefixes: {', '.join(p for prefixes in PREFIXES.values() for p in prefixes)}",
        )
    return {component: TensorSource(entries) for component, entries in found.items()}


def detect_keys(transformer: TensorSource) -> Sd3Keys:
    """Detect depth, qk-norm and dual attention from the names alone.

    Raises:
        CheckpointError: the blocks are not numbered from 0 on.
    """
    blocks = {name.split(".")[1] for name in transformer if name.startswith("joint_blocks.")}
    if blocks != {str(index) for index in range(len(blocks))}:
        raise CheckpointError(
            f"the file's {len(blocks)} blocks are not numbered 0 to {len(blocks) - 1}",
            hint="the file is incomplete or not a whole network: fetch it again",
        )
    dual = {int(name.split(".")[1]) for name in transformer if ".attn2." in name}
    return Sd3Keys(
        num_layers=len(blocks),
        qk_norm=any(".ln_q." in name for name in transformer),
        dual_attention_layers=tuple(sorted(dual)),
    )


def transformer_config(transformer: TensorSource, keys: Sd3Keys, resolution: int) -> dict[str, Any]:
    """diffusers' config.json of the transformer. Raises CheckpointError if the shapes are not those of SD3."""
    width, in_channels, patch_size = _shape(transformer, "x_embedder.proj.weight", 4)[:3]
    positions = _shape(transformer, "pos_embed", 3)[1]
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head_dim = _shape(transformer, norm, 1)[0] if keys.qk_norm else HEAD_DIM
    if math.isqrt(positions) ** 2 != positions or width % head_dim:
        raise CheckpointError(
            f"pos_embed has {positions} positions, which must be a square number, and the width is {width}, which must "
            f"be a multiple of the head size {head_dim}",
            hint=sd3_keys.FOREIGN,
        )
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": resolution // PIXELS_PER_LATENT,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": keys.num_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": _shape(transformer, "context_embedder.weight", 2)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": _shape(transformer, "y_embedder.mlp.0.weight", 2)[1],
        "out_channels": _shape(transformer, "final_layer.linear.weight", 2)[0] // patch_size**2,
        "pos_embed_max_size": math.isqrt(positions),
        "dual_attention_layers": list(keys.dual_attention_layers),
        "qk_norm": "rms_norm" if keys.qk_norm else None,
    }


def vae_config(vae: TensorSource, resolution: int) -> dict[str, Any]:
    """diffusers' config.json of the autoencoder. Raises CheckpointError if the shapes are not an AutoencoderKL's."""
    keys = kl_keys.kl_keys(vae)
    widths = [_shape(vae, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(keys.stages)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(vae, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(vae, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["DownEncoderBlock2D"] * keys.stages,
        "up_block_types": ["UpDecoderBlock2D"] * keys.stages,
        "block_out_channels": widths,
        "layers_per_block": keys.depth,
        "act_fn": "silu",
        "latent_channels": _shape(vae, "decoder.conv_in.weight", 4)[1],
        "norm_num_groups": GROUPS,
        "sample_size": resolution,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in vae,
    }


def clip_config(component: str, clip: TensorSource) -> dict[str, Any]:
    """transformers' config.json of a CLIPTextModelWithProjection. Raises CheckpointError if a tensor is missing."""
    vocabulary, width = _shape(clip, "text_model.embeddings.token_embedding.weight", 2)
    fc1 = "text_model.encoder.layers.0.mlp.fc1.weight"
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(clip, fc1, 2)[0],
        "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") for name in clip),
        "num_attention_heads": width // CLIP_HEAD_DIM,
        "max_position_embeddings": _shape(clip, "text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": ACTIVATIONS[component],
        "layer_norm_eps": 1e-5,
        "projection_dim": clip.shape("text_projection.weight")[0]
        if "text_projection.weight" in clip
        else width,
        "bos_token_id": 0,
        # As in the released configs: for 2, transformers takes the largest id as the end of text (#24773).
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def with_projection(clip: TensorSource) -> TensorSource:
    """CLIP's tensors, with the identity as text projection if the file has none.

    Files leave CLIP-L's projection out, because it is the identity (diffusers: create_diffusers_clip_model).
    """
    if "text_projection.weight" in clip:
        return clip
    embedding = clip.entry("text_model.embeddings.token_embedding.weight")
    width, dtype = embedding.shape[1], embedding.dtype
    identity = TensorEntry((width, width), dtype, lambda: torch.eye(width).to(dtype))
    return TensorSource({**{name: clip.entry(name) for name in clip}, "text_projection.weight": identity})


def t5_config(t5: TensorSource) -> dict[str, Any]:
    """transformers' config.json of a T5EncoderModel (v1.1). Raises CheckpointError if a tensor is missing."""
    vocabulary, width = _shape(t5, "shared.weight", 2)
    block = "encoder.block.0.layer"
    bias = _shape(t5, f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(t5, f"{block}.0.SelfAttention.q.weight", 2)[0] // bias[1],
        "d_ff": _shape(t5, f"{block}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": sum(name.endswith(".SelfAttention.q.weight") for name in t5),
        "num_heads": bias[1],
        "relative_attention_num_buckets": bias[0],
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def _component_of(name: str, *, bare: bool) -> tuple[str | None, str]:
    """The component that a tensor belongs to, and its name without the prefix.

    Args:
        bare: names without a known prefix are the transformer's.
    """
    for component, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return component, name.removeprefix(prefix)
    return ("transformer" if bare else None), name


def _shape(tensors: TensorSource, name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors.shape(name)) != rank:
        found = list(tensors.shape(name)) if name in tensors else "missing"
        raise CheckpointError(
            f"{name} is {found}, but must be a tensor of {rank} dimensions", hint=sd3_keys.FOREIGN
        )
    return tensors.shape(name)
