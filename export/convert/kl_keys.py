"""Names of AutoencoderKL's tensors in the latent-diffusion code and in diffusers: one table, read in both directions.

Source: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py; diffusers 0.42.1,
loaders/single_file_utils.py (convert_ldm_vae_checkpoint). The latent-diffusion code numbers the decoder's stages from
the largest picture, diffusers from the smallest. Its attention has 1x1 convolutions where diffusers has Linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert.key_map import check_names, reshaped

FOREIGN = "the file is damaged, or its autoencoder is not an AutoencoderKL"
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OUTER = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KlKeys:
    """The sizes that decide which tensors an AutoencoderKL may have.

    Attributes:
        stages: resolutions that the encoder and the decoder go through.
        depth: residual blocks per stage of the encoder; a stage of the decoder has one more.
    """

    stages: int
    depth: int

    def modules(self) -> dict[str, str]:
        """Native name -> diffusers' name, for every module that such a network may have."""
        names = {name: name for name in ("quant_conv", "post_quant_conv")}
        for side in ("encoder", "decoder"):
            inner = _OUTER | self._middle() | (self._down() if side == "encoder" else self._up())
            names |= {f"{side}.{native}": f"{side}.{diffusers}" for native, diffusers in inner.items()}
        return names

    def _middle(self) -> dict[str, str]:
        names = {f"mid.attn_1.{a}": f"mid_block.attentions.0.{b}" for a, b in _ATTENTION.items()}
        for index in (0, 1):
            names |= {
                f"mid.block_{index + 1}.{a}": f"mid_block.resnets.{index}.{b}" for a, b in _RESNET.items()
            }
        return names

    def _down(self) -> dict[str, str]:
        names = {}
        for i in range(self.stages):
            names[f"down.{i}.downsample.conv"] = f"down_blocks.{i}.downsamplers.0.conv"
            names |= _stage(f"down.{i}", f"down_blocks.{i}", self.depth)
        return names

    def _up(self) -> dict[str, str]:
        names = {}
        for i in range(self.stages):
            native = self.stages - 1 - i
            names[f"up.{native}.upsample.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
            names |= _stage(f"up.{native}", f"up_blocks.{i}", self.depth + 1)
        return names


def kl_keys(native: TensorSource) -> KlKeys:
    """Count stages and depth from native names."""
    encoder = [name.split(".") for name in native if name.startswith("encoder.down.")]
    stages = {parts[2] for parts in encoder}
    return KlKeys(
        stages=len(stages), depth=len({parts[4] for parts in encoder if parts[2:4] == ["0", "block"]})
    )


def kl_keys_of_diffusers(tensors: TensorSource) -> KlKeys:
    """Count stages and depth from diffusers' names."""
    encoder = [name.split(".") for name in tensors if name.startswith("encoder.down_blocks.")]
    stages = {parts[2] for parts in encoder}
    return KlKeys(
        stages=len(stages), depth=len({parts[4] for parts in encoder if parts[2:4] == ["0", "resnets"]})
    )


def to_diffusers(native: TensorSource, keys: KlKeys) -> TensorSource:
    """The same weights under diffusers' names. Raises CheckpointError if there is an unknown tensor."""
    return _renamed(native, keys.modules(), _as_linear)


def to_native(diffusers: TensorSource, keys: KlKeys) -> TensorSource:
    """The same weights under native names. Raises CheckpointError if there is an unknown tensor."""
    return _renamed(diffusers, {b: a for a, b in keys.modules().items()}, _as_convolution)


def _renamed(
    source: TensorSource, modules: dict[str, str], fit: Callable[[str, TensorEntry], TensorEntry]
) -> TensorSource:
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    # Some modules of the table are optional (shortcuts, attention, quant convolutions), so no name must be in the file.
    check_names(set(source), set(names) & set(source), hint=FOREIGN)
    return TensorSource({names[name]: fit(names[name], source.entry(name)) for name in source})


def _as_linear(name: str, entry: TensorEntry) -> TensorEntry:
    is_attention = ".attentions.0.to_" in name and name.endswith(".weight")
    return reshaped(entry, entry.shape[:2]) if is_attention else entry


def _as_convolution(name: str, entry: TensorEntry) -> TensorEntry:
    is_attention = ".attn_1." in name and ".norm." not in name and name.endswith(".weight")
    return reshaped(entry, (*entry.shape, 1, 1)) if is_attention else entry


def _stage(native: str, diffusers: str, depth: int) -> dict[str, str]:
    return {
        f"{native}.block.{j}.{a}": f"{diffusers}.resnets.{j}.{b}"
        for j in range(depth)
        for a, b in _RESNET.items()
    }
