"""The settings of a DC-AE, as diffusers' vae/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditc.export.networks.config import read_config
from ditc.runtime.errors import CheckpointError

BLOCKS = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
ACTIVATIONS = ("silu", "swish", "relu", "gelu", "mish")
DEFAULT_CHANNELS = (128, 256, 512, 512, 1024, 1024)
# Settings that are one name for all stages, or a list with a name per stage. The values are diffusers' defaults.
PER_STAGE = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DcAeConfig:
    """The autoencoder's settings. Names and defaults are those of diffusers 0.42.1's AutoencoderDC.

    Tuples have one value per stage; index 0 is the stage with the largest picture.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = DEFAULT_CHANNELS
    decoder_block_out_channels: tuple[int, ...] = DEFAULT_CHANNELS
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    @property
    def scale_factor(self) -> int:
        """Side of one latent cell in pixels."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DcAeConfig:
        """Parse vae/config.json.

        Raises:
            CheckpointError: a setting is unknown, or the networks here do not implement it.
        """
        values = {**values}
        for name, default in PER_STAGE.items():
            stages = len(values.get(name.partition("_")[0] + "_block_out_channels", DEFAULT_CHANNELS))
            value = values.get(name, default)
            values[name] = (value,) * stages if isinstance(value, str) else tuple(value)
        config = read_config(cls, values, ignored=())
        _check_choices(config)
        _check_lengths(config)
        return config


def _check_choices(config: DcAeConfig) -> None:
    chosen = {
        "encoder_block_types": (config.encoder_block_types, BLOCKS),
        "decoder_block_types": (config.decoder_block_types, BLOCKS),
        "decoder_norm_types": (config.decoder_norm_types, NORMS),
        "decoder_act_fns": (config.decoder_act_fns, ACTIVATIONS),
        "decoder_conv_act_fn": ((config.decoder_conv_act_fn,), ACTIVATIONS),
    }
    for name, (values, known) in chosen.items():
        for value in values:
            if value not in known:
                raise CheckpointError(f"{name} has {value!r}, but only {', '.join(known)} can be used")


def _check_lengths(config: DcAeConfig) -> None:
    for side in ("encoder", "decoder"):
        stages = len(getattr(config, f"{side}_block_out_channels"))
        for name in ("block_types", "layers_per_block", "qkv_multiscales"):
            length = len(getattr(config, f"{side}_{name}"))
            if length != stages:
                raise CheckpointError(
                    f"{side}_{name} has {length} entries, but {side}_block_out_channels has {stages}"
                )
