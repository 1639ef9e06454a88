"""The settings of a lucidrains/mmdit denoiser: upstream's arguments of the trunk, and ditc's of the layers around it.

transformer/config.json:

    _class_name       "LucidrainsMMDiT"
    trunk_class       "MMDiT" for mmdit.mmdit_pytorch's MMDiT, "GeneralizedMMDiT" for mmdit.mmdit_generalized_pytorch's
    trunk             the arguments that were given to that class
    in_channels ...   the other fields of MMDiTConfig
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ditc.export.families.lucidrains.layers import check_feedforward
from ditc.export.networks.config import read_config
from ditc.runtime.errors import CheckpointError

CLASS_NAME = "LucidrainsMMDiT"
TWO_MODALITIES = "MMDiT"
GENERALIZED = "GeneralizedMMDiT"

_BLOCK = {
    "depth",
    "dim_cond",
    "dim_head",
    "heads",
    "qk_rmsnorm",
    "flash_attn",
    "num_residual_streams",
    "ff_kwargs",
}
# Upstream takes should_skip_last_feedforward in forward, not in the constructor; here it is one of the arguments.
ARGUMENTS = {
    TWO_MODALITIES: _BLOCK
    | {"dim_text", "dim_image", "num_register_tokens", "final_norm", "should_skip_last_feedforward"},
    GENERALIZED: _BLOCK | {"dim_modalities", "final_norms", "mhc_kwargs", "softclamp", "softclamp_value"},
}
REQUIRED = {
    TWO_MODALITIES: {"depth", "dim_text", "dim_image", "dim_cond"},
    GENERALIZED: {"depth", "dim_modalities", "dim_cond"},
}
_SHARED_STREAMS = ("add_stream_embed", "add_attn_pool_reduce_stream")
# The layout is ditc's own, so no class of upstream has a default for what its config leaves out.
REQUIRED_SHELL = {
    *("trunk_class", "in_channels", "out_channels", "patch_size", "sample_size", "caption_channels"),
}
MHC_ARGUMENTS = {*_SHARED_STREAMS, "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTConfig:
    """The trunk's class and arguments, and the settings of the layers around it, named as in diffusers.

    Attributes:
        sample_size: side in latent cells at which the position embedding's unit is one patch.
        caption_channels: channels of the text encoder's states, which are projected to the trunk's text width.
        interpolation_scale: scale of the position embedding, as in diffusers' get_2d_sincos_pos_embed.
        timestep_scale: factor that the scheduler's timesteps are multiplied by before the network sees them.
    """

    trunk_class: str = TWO_MODALITIES
    trunk: Mapping[str, Any] = field(default_factory=dict)
    in_channels: int = 32
    out_channels: int = 32
    patch_size: int = 1
    sample_size: int = 32
    caption_channels: int = 2304
    interpolation_scale: float = 1.0
    timestep_scale: float = 1.0

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the trunk's modalities: the text's first, then the image's."""
        if self.trunk_class == GENERALIZED:
            return tuple(self.trunk["dim_modalities"])
        return self.trunk["dim_text"], self.trunk["dim_image"]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """Parse transformer/config.json.

        Raises:
            CheckpointError: a setting is unknown or missing, or the networks here do not implement it.
        """
        shell = {name: value for name, value in values.items() if name != "trunk"}
        trunk = values.get("trunk", {})
        if not isinstance(trunk, Mapping):
            raise CheckpointError(
                f"trunk is {trunk!r} in the {CLASS_NAME} config.json, but must be an object",
                hint="it holds the arguments of the trunk's class: see docs/mmdit.md",
            )
        if missing := sorted(REQUIRED_SHELL - set(values)):
            raise CheckpointError(
                f"{missing[0]} is missing in the {CLASS_NAME} config.json",
                hint="set it to the value that the network was trained with: see docs/mmdit.md",
            )
        config = dataclasses.replace(read_config(cls, shell, ignored=()), trunk=trunk)
        _check_trunk(config.trunk_class, config.trunk)
        _check_shell(config)
        return config


def _check_trunk(trunk_class: str, trunk: Mapping[str, Any]) -> None:
    if trunk_class not in ARGUMENTS:
        raise CheckpointError(
            f"trunk_class is {trunk_class!r}, which is not supported",
            hint=f"choose {' or '.join(ARGUMENTS)}, the classes of mmdit 0.3.0",
        )
    unknown, missing = (
        sorted(set(trunk) - ARGUMENTS[trunk_class]),
        sorted(REQUIRED[trunk_class] - set(trunk)),
    )
    if unknown:
        raise CheckpointError(
            f"trunk has {unknown[0]} = {trunk[unknown[0]]!r}, which {trunk_class} of mmdit 0.3.0 does not take",
            hint=f"it takes {', '.join(sorted(ARGUMENTS[trunk_class]))}",
        )
    if missing:
        raise CheckpointError(
            f"trunk lacks {', '.join(missing)}",
            hint="a denoiser needs them all; dim_cond is the width of its time condition",
        )
    for name in REQUIRED[trunk_class]:
        sizes = trunk[name] if name == "dim_modalities" else [trunk[name]]
        if not isinstance(sizes, list | tuple) or not all(type(size) is int and size > 0 for size in sizes):
            raise CheckpointError(
                f"trunk has {name} = {trunk[name]!r}, but it must be made of positive integers",
                hint="it is the argument that the trunk was made with",
            )
    for name in ("ff_kwargs", "mhc_kwargs"):
        if not isinstance(trunk.get(name) or {}, Mapping):
            raise CheckpointError(
                f"trunk has {name} = {trunk[name]!r}, but it must be an object",
                hint="it holds arguments by name; leave it out for upstream's defaults",
            )
    check_feedforward(trunk.get("ff_kwargs") or {})
    _check_streams(trunk)
    if trunk.get("softclamp") and trunk.get("flash_attn"):
        raise CheckpointError(
            "upstream does not allow softclamp and flash_attn together",
            hint="set flash_attn to false in the config",
        )


def _check_streams(trunk: Mapping[str, Any]) -> None:
    """Refuse mhc_kwargs that upstream cannot use.

    Upstream passes them only to the modules that expand and reduce the streams, where sinkhorn_iters is a TypeError.
    """
    mhc = trunk.get("mhc_kwargs") or {}
    foreign = sorted(set(mhc) - MHC_ARGUMENTS)
    if foreign:
        raise CheckpointError(
            f"mhc_kwargs has {foreign[0]} = {mhc[foreign[0]]!r}, which mmdit 0.3.0 cannot pass on to its blocks",
            hint=f"it takes {', '.join(sorted(MHC_ARGUMENTS))}",
        )
    if any(mhc.get(name) for name in _SHARED_STREAMS) and {*trunk["dim_modalities"]} != {mhc.get("dim")}:
        raise CheckpointError(
            f"mhc_kwargs asks for one stream embedding of {mhc.get('dim')} channels, but the modalities have "
            f"{trunk['dim_modalities']} channels",
            hint="give every modality that width, or leave mhc_kwargs out",
        )


def _check_shell(config: MMDiTConfig) -> None:
    if len(config.dims) != 2:
        raise CheckpointError(
            f"a denoiser has two modalities, text and image, but this trunk has {len(config.dims)}",
            hint="a trunk of more modalities can be exported by itself: see docs/mmdit.md",
        )
    if config.dims[1] % 4:
        raise CheckpointError(
            f"the position embedding needs an image width divisible by 4, not {config.dims[1]}",
            hint="train the trunk with such a width",
        )
    if config.out_channels != config.in_channels:
        raise CheckpointError(
            f"out_channels is {config.out_channels}, but must be {config.in_channels} like in_channels",
            hint="correct the one that is wrong in transformer/config.json",
        )
    if config.sample_size % config.patch_size:
        raise CheckpointError(
            f"patch_size {config.patch_size} does not divide sample_size {config.sample_size}",
            hint="correct the one that is wrong in transformer/config.json",
        )
