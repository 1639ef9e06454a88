"""The config of a native SANA-Video checkpoint: keys and shapes show most of it, and options give the rest."""

from __future__ import annotations

from typing import Any

from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.layout import NativeOptions
from ditc.export.families.sana.keys import SanaKeys
from ditc.export.families.sana.native import check_values, head_dims, shape_of
from ditc.runtime.errors import UsageError

# hidden size -> head dims of self- and cross-attention. SANA-Video 2B is 20x112 in both (configs of NVlabs/Sana).
HEAD_DIMS = {2240: (112, 112)}
# --resolution -> sample_size, by which diffusers' SanaVideoPipeline (0.42.1) knows the table of sizes.
SAMPLE_SIZES = {480: 30, 720: 22}


def video_transformer_config(tensors: TensorSource, keys: SanaKeys, options: NativeOptions) -> dict[str, Any]:
    """Make diffusers' config.json of the network.

    Raises:
        UsageError: a required option is missing, or an option has an impossible value.
        CheckpointError: the shapes are not those of a SANA-Video network.
    """
    hidden, in_channels, *patch_size = shape_of(tensors, "x_embedder.proj.weight", 5)
    _check_options(options)
    head_dim, cross_head_dim = head_dims(hidden, options, HEAD_DIMS)
    ff_channels = shape_of(tensors, "blocks.0.mlp.inverted_conv.conv.weight", 4)[0] // 2  # value and gate
    return {
        "_class_name": "SanaVideoTransformer3DModel",
        "in_channels": in_channels,
        "out_channels": shape_of(tensors, "final_layer.linear.weight", 2)[0] // patch_size[-1] ** 2,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": keys.num_layers,
        "num_cross_attention_heads": hidden // cross_head_dim,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": hidden,
        "caption_channels": shape_of(tensors, "y_embedder.y_proj.fc1.weight", 2)[1],
        "mlp_ratio": ff_channels / hidden,
        "attention_bias": False,
        "sample_size": SAMPLE_SIZES[options.resolution or 0],
        "patch_size": patch_size,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm_across_heads" if keys.qk_norm else None,
        "rope_max_seq_len": 1024,
    }


def _check_options(options: NativeOptions) -> None:
    needed = {"resolution": options.resolution, "flow-shift": options.flow_shift, "dtype": options.dtype}
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise UsageError(
            f"the file's tensors do not show every setting; also give {', '.join(missing)}",
            hint="SANA-Video 2B: --resolution 480 --flow-shift 8 --dtype bf16 (NVlabs/Sana's command lines)",
        )
    if options.resolution not in SAMPLE_SIZES:
        raise UsageError(
            f"--resolution {options.resolution} is not one of {', '.join(map(str, SAMPLE_SIZES))}",
            hint="for a video network, it is the height of the videos that it was trained for",
        )
    if options.position_embedding not in (None, "none"):
        raise UsageError(
            f"--position-embedding {options.position_embedding} is of image networks",
            hint="leave --position-embedding out: a video network always has rotary positions",
        )
    check_values(options)
