"""The settings of a DC-AE, as diffusers' vae/config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ditc.export.networks.config import MAX_STAGES, read_config
from ditc.runtime.errors import CheckpointError

FETCH = "vae/config.json is damaged or was edited, or is of another VAE: fetch it again"
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
            side = name.partition("_")[0]
            channels = values.get(f"{side}_block_out_channels", DEFAULT_CHANNELS)
            if isinstance(values.get(name, default), str) and isinstance(channels, list | tuple):
                values[name] = [values.get(name, default)] * len(channels)
        layers = ("encoder_layers_per_block", "decoder_layers_per_block")
        config = read_config(cls, values, ignored=(), may_be_zero=layers)
        _check_choices(config)
        _check_lengths(config)
        _check_sizes(config)
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
                raise CheckpointError(
                    f"{name} has {value!r}, but only {', '.join(known)} can be used", hint=FETCH
                )


def _check_lengths(config: DcAeConfig) -> None:
    for side in ("encoder", "decoder"):
        stages = len(getattr(config, f"{side}_block_out_channels"))
        for name in (*PER_STAGE, f"{side}_layers_per_block", f"{side}_qkv_multiscales"):
            length = len(getattr(config, name))
            if name.startswith(side) and length != stages:
                raise CheckpointError(
                    f"{name} has {length} entries, but {side}_block_out_channels has {stages}", hint=FETCH
                )


def _check_sizes(config: DcAeConfig) -> None:
    """Refuse sizes with which diffusers fails at the first picture, or with which a bundle could not be used."""
    encoder, decoder = config.encoder_block_out_channels, config.decoder_block_out_channels
    for wrong, what in (
        (len(encoder) != len(decoder), f"the encoder has {len(encoder)} stages, the decoder {len(decoder)}"),
        (len(encoder) > MAX_STAGES, f"there are {len(encoder)} stages, and {MAX_STAGES} are the most"),
        (len(encoder) < 2, f"there are {len(encoder)} stages, and latents need at least 2"),
        (config.in_channels != 3, f"in_channels is {config.in_channels}, and a picture has 3"),
        (config.scaling_factor == 0, "scaling_factor is 0, and latents are divided by it"),
    ):
        if wrong:
            raise CheckpointError(f"the DcAe config.json cannot be used: {what}", hint=FETCH)
    steps = [(config.encoder_out_shortcut, encoder[-1], config.latent_channels)]
    steps += [(config.decoder_in_shortcut, decoder[-1], config.latent_channels)]
    steps += [(True, 4 * before, after) for before, after in pairwise(encoder)]
    steps += [(True, 4 * after, before) for after, before in pairwise(decoder)]
    for has_shortcut, more, fewer in steps:
        if has_shortcut and more % fewer:
            raise CheckpointError(
                f"a shortcut cannot divide {more} channels into {fewer} groups: block_out_channels are {encoder} and "
                f"{decoder}, latent_channels are {config.latent_channels}",
                hint=FETCH,
            )
