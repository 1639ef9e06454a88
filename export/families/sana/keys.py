"""The names of Sana's weights in NVlabs' native files and in diffusers, as one table that is read in both directions.

Source: NVlabs/Sana tools/convert_scripts/convert_sana_to_diffusers.py and diffusers
scripts/convert_sana_to_diffusers.py (the same map). Where the native network fuses projections, one native
tensor is the concatenation (dim 0) of several diffusers tensors, in the order given.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert.key_map import check_names, joined, native_names_of, split
from ditc.runtime.weight_map import NativeName

# Training-only tensors (CFG dropout, loss weighting) and a table that inference recomputes.
DROPPED = frozenset({"y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias"})

# Native -> diffusers; each name stands for its .weight and .bias.
_LAYERS = {
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
}
_GUIDANCE_LAYERS = {
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}
_TENSORS = {
    "attention_y_norm.weight": "caption_norm.weight",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_BLOCK_TENSORS: dict[str, tuple[str, ...]] = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
    "attn.proj.weight": ("attn1.to_out.0.weight",),
    "attn.proj.bias": ("attn1.to_out.0.bias",),
    "cross_attn.q_linear.weight": ("attn2.to_q.weight",),
    "cross_attn.q_linear.bias": ("attn2.to_q.bias",),
    "cross_attn.kv_linear.weight": ("attn2.to_k.weight", "attn2.to_v.weight"),
    "cross_attn.kv_linear.bias": ("attn2.to_k.bias", "attn2.to_v.bias"),
    "cross_attn.proj.weight": ("attn2.to_out.0.weight",),
    "cross_attn.proj.bias": ("attn2.to_out.0.bias",),
    "mlp.inverted_conv.conv.weight": ("ff.conv_inverted.weight",),
    "mlp.inverted_conv.conv.bias": ("ff.conv_inverted.bias",),
    "mlp.depth_conv.conv.weight": ("ff.conv_depth.weight",),
    "mlp.depth_conv.conv.bias": ("ff.conv_depth.bias",),
    "mlp.point_conv.conv.weight": ("ff.conv_point.weight",),
}
_BLOCK_VIDEO = {"mlp.t_conv.weight": ("ff.conv_temp.weight",)}
_BLOCK_QK_NORM = {
    "attn.q_norm.weight": ("attn1.norm_q.weight",),
    "attn.k_norm.weight": ("attn1.norm_k.weight",),
    "cross_attn.q_norm.weight": ("attn2.norm_q.weight",),
    "cross_attn.k_norm.weight": ("attn2.norm_k.weight",),
}

FOREIGN = "the file is damaged, or its network is not one of Sana, SANA-1.5, SANA-Sprint or SANA-Video"


@dataclass(frozen=True, slots=True, kw_only=True)
class SanaKeys:
    """The facts that decide which tensors a Sana transformer has."""

    num_layers: int
    qk_norm: bool
    guidance_embeds: bool
    video: bool = False

    def rows(self) -> dict[str, tuple[str, ...]]:
        """For the native name of every tensor, the names of the diffusers tensors that it holds."""
        embedder = "time_embed" if self.guidance_embeds else "time_embed.emb"
        layers = _LAYERS | {
            "x_embedder.proj": "patch_embedding" if self.video else "patch_embed.proj",
            "t_embedder.mlp.0": f"{embedder}.timestep_embedder.linear_1",
            "t_embedder.mlp.2": f"{embedder}.timestep_embedder.linear_2",
        }
        if self.guidance_embeds:
            layers |= _GUIDANCE_LAYERS
        rows: dict[str, tuple[str, ...]] = {native: (diffusers,) for native, diffusers in _TENSORS.items()}
        for native, diffusers in layers.items():
            for kind in ("weight", "bias"):
                rows[f"{native}.{kind}"] = (f"{diffusers}.{kind}",)
        block = _BLOCK_TENSORS | (_BLOCK_QK_NORM if self.qk_norm else {})
        block |= _BLOCK_VIDEO if self.video else {}
        for index in range(self.num_layers):
            for native, parts in block.items():
                rows[f"blocks.{index}.{native}"] = tuple(
                    f"transformer_blocks.{index}.{part}" for part in parts
                )
        return rows


def keys_of(diffusers: Collection[str]) -> SanaKeys:
    """What the names of a transformer's tensors in diffusers show."""
    return SanaKeys(
        num_layers=sum(name.endswith(".attn1.to_q.weight") for name in diffusers),
        qk_norm=any(name.endswith(".norm_q.weight") for name in diffusers),
        guidance_embeds=any(".guidance_embedder." in name for name in diffusers),
        video=any(name.endswith(".ff.conv_temp.weight") for name in diffusers),
    )


def native_names(diffusers: Collection[str]) -> dict[str, NativeName]:
    """Where NVlabs' files hold each tensor of a transformer, by its name in diffusers."""
    return native_names_of(keys_of(diffusers).rows())


def to_diffusers(native: TensorSource, keys: SanaKeys) -> TensorSource:
    """The same weights under diffusers' names, split where the native network fuses them. No weight is read yet.

    Raises:
        CheckpointError: a tensor is missing or unknown, or cannot be split evenly.
    """
    rows = keys.rows()
    check_names(set(native) - DROPPED, set(rows), hint=FOREIGN)
    entries: dict[str, TensorEntry] = {}
    for name, parts in rows.items():
        entries.update(zip(parts, split(name, native.entry(name), len(parts)), strict=True))
    return TensorSource(entries)


def to_native(diffusers: TensorSource, keys: SanaKeys) -> TensorSource:
    """The same weights under the native names, concatenated where the native network fuses them.

    Training-only tensors (DROPPED) cannot be restored, so the native network must load the result with strict=False.

    Raises:
        CheckpointError: a tensor is missing or unknown.
    """
    rows = keys.rows()
    check_names(set(diffusers), {part for parts in rows.values() for part in parts}, hint=FOREIGN)
    return TensorSource(
        {name: joined([diffusers.entry(part) for part in parts]) for name, parts in rows.items()}
    )
