"""The config of a native Sana checkpoint: keys and shapes show most of it, and options give the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.layout import DTYPES, NativeOptions
from ditc.export.families.sana.keys import FOREIGN, SanaKeys
from ditc.runtime.errors import CheckpointError, UsageError

BLOCK_0 = "blocks.0.attn.qkv.weight"
VIDEO = "mlp.t_conv.weight"  # the temporal convolution that only SANA-Video has
POSITION_EMBEDDINGS = ("none", "sincos")

# hidden size -> (self-attention head dim, cross-attention head dim) of the released networks. In heads x head dim,
# Sana 0.6B is 36x32 and 16x72, and 1.6B and 4.8B are 70x32 and 20x112 (configs of NVlabs/Sana).
HEAD_DIMS = {1152: (32, 72), 2240: (32, 112)}

# DC-AE f32: latents are 1/32 of the picture's height and width.
PIXELS_PER_LATENT = 32


def is_native(names: Collection[str]) -> bool:
    """Whether the names are those of a Sana network in NVlabs' layout."""
    return BLOCK_0 in names or any(name.endswith(VIDEO) for name in names)


def detect_keys(tensors: TensorSource) -> SanaKeys:
    """Detect depth, qk-norm, guidance embedding and temporal convolutions from the names alone.

    Raises:
        CheckpointError: the blocks are not numbered from 0 on.
    """
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if blocks != {str(index) for index in range(len(blocks))}:
        raise CheckpointError(
            f"the file's {len(blocks)} blocks are not numbered 0 to {len(blocks) - 1}",
            hint="the file is incomplete or not a whole network: fetch it again",
        )
    return SanaKeys(
        num_layers=len(blocks),
        qk_norm=any(name.endswith(".q_norm.weight") for name in tensors),
        guidance_embeds=any(name.startswith("cfg_embedder.") for name in tensors),
        video=any(name.endswith(VIDEO) for name in tensors),
    )


def transformer_config(tensors: TensorSource, keys: SanaKeys, options: NativeOptions) -> dict[str, Any]:
    """Make diffusers' config.json of an image network. That of a video network is made in video_native.py.

    Raises:
        UsageError: a required option is missing, or an option has an impossible value.
        CheckpointError: the shapes are not those of a Sana network.
    """
    _check_options(keys, options)
    hidden, in_channels, patch_size = shape_of(tensors, "x_embedder.proj.weight", 4)[:3]
    head_dim, cross_head_dim = head_dims(hidden, options, HEAD_DIMS)
    ff_channels = shape_of(tensors, "blocks.0.mlp.inverted_conv.conv.weight", 4)[0] // 2  # value and gate
    resolution = options.resolution or 0
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": in_channels,
        "out_channels": shape_of(tensors, "final_layer.linear.weight", 2)[0] // patch_size**2,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": keys.num_layers,
        "num_cross_attention_heads": hidden // cross_head_dim,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": hidden,
        "caption_channels": shape_of(tensors, "y_embedder.y_proj.fc1.weight", 2)[1],
        "mlp_ratio": ff_channels / hidden,
        "attention_bias": False,
        "sample_size": resolution // PIXELS_PER_LATENT,
        "patch_size": patch_size,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": options.interpolation_scale
        if options.position_embedding == "sincos"
        else None,
        "guidance_embeds": keys.guidance_embeds,
        "guidance_embeds_scale": 0.1,
        "qk_norm": "rms_norm_across_heads" if keys.qk_norm else None,
        "timestep_scale": 1.0,
    }


def _check_options(keys: SanaKeys, options: NativeOptions) -> None:
    needed: dict[str, object] = {
        "resolution": options.resolution,
        "position-embedding": options.position_embedding,
        "dtype": options.dtype,
    }
    if not keys.guidance_embeds:
        needed["flow-shift"] = options.flow_shift
    if options.position_embedding == "sincos":
        needed["interpolation-scale"] = options.interpolation_scale
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise UsageError(
            f"the file's tensors do not show every setting; also give {', '.join(missing)}",
            hint="for released networks, 512 and 1024 px: --flow-shift 3 --position-embedding none; 2048 px: "
            "--flow-shift 3 --position-embedding sincos --interpolation-scale 1; 4096 px: --flow-shift 6 "
            "--position-embedding sincos --interpolation-scale 2; --dtype follows the release's name: "
            "bf16 for BF16, SANA-1.5 and Sprint, else fp16",
        )
    _check_choice("position-embedding", options.position_embedding, POSITION_EMBEDDINGS)
    if options.resolution is not None and (options.resolution <= 0 or options.resolution % PIXELS_PER_LATENT):
        raise UsageError(
            f"--resolution {options.resolution} is not a positive multiple of {PIXELS_PER_LATENT}",
            hint="give the resolution that the network was trained for, such as 1024",
        )
    check_values(options)


def check_values(options: NativeOptions) -> None:
    """Refuse impossible values of the options that all networks need. Raises UsageError."""
    _check_choice("dtype", options.dtype, tuple(DTYPES))
    if options.flow_shift is not None and not 0 < options.flow_shift < float("inf"):
        raise UsageError(
            f"--flow-shift {options.flow_shift} is not a positive number",
            hint="give the shift of the model's scheduler, such as 3.0",
        )


def _check_choice(name: str, value: str | None, known: Collection[str]) -> None:
    if value not in known:
        raise UsageError(
            f"--{name} {value} is not one of {', '.join(known)}",
            hint=f"give one of them, or leave --{name} out",
        )


def head_dims(
    hidden: int, options: NativeOptions, releases: Mapping[int, tuple[int, int]]
) -> tuple[int, int]:
    """The head dimensions of self- and cross-attention: those of the options, or of a release with this hidden size.

    Raises:
        UsageError: neither says them, or one does not divide the hidden size.
    """
    known = releases.get(hidden, (None, None))
    head_dim = options.attention_head_dim or known[0]
    cross_head_dim = options.cross_attention_head_dim or known[1]
    if head_dim is None or cross_head_dim is None:
        raise UsageError(
            f"the file's tensors do not show the head sizes of a network with hidden size {hidden}",
            hint="give --attention-head-dim and --cross-attention-head-dim; they are known for the hidden sizes "
            + ", ".join(map(str, releases)),
        )
    for name, size in (("attention", head_dim), ("cross-attention", cross_head_dim)):
        if size <= 0 or hidden % size:
            raise UsageError(
                f"--{name}-head-dim {size} does not divide the hidden size {hidden}",
                hint="take the head size from the model's config",
            )
    return head_dim, cross_head_dim


def shape_of(tensors: TensorSource, name: str, rank: int) -> tuple[int, ...]:
    """The shape of the named tensor. Raises CheckpointError if it is missing or of another rank."""
    if name not in tensors or len(tensors.shape(name)) != rank:
        found = list(tensors.shape(name)) if name in tensors else "missing"
        raise CheckpointError(f"{name} is {found}, but must be a tensor of {rank} dimensions", hint=FOREIGN)
    return tensors.shape(name)
