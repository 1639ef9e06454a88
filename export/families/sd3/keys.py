"""The names of SD3's weights in Stability's files and in diffusers, as one table that is read in both directions.

Source: Stability-AI/sd3.5, mmditx.py; diffusers 0.42.1, loaders/single_file_utils.py
(convert_sd3_transformer_checkpoint_to_diffusers). Stability fuses q, k and v. In two modulations, that of the final
layer and that of the text in the last block, Stability has shift before scale and diffusers has scale before shift.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.export.convert.key_map import check_names, joined, native_names_of, split, swapped
from ditc.runtime.weight_map import NativeName

# Native -> diffusers; each name stands for its .weight and .bias.
_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_Parts = dict[str, tuple[str, ...]]
_BLOCK: _Parts = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
# In every block but the last, where the text stream ends.
_TEXT_OUTPUT: _Parts = {
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_DUAL: _Parts = {
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
}
# Weights without a bias.
_QK_NORM = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_DUAL_QK_NORM = {"x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k"}

FOREIGN = "the file is damaged, or its network is not SD3 or SD3.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sd3Keys:
    """The facts that decide which tensors an SD3 transformer has."""

    num_layers: int
    qk_norm: bool
    dual_attention_layers: tuple[int, ...]

    def rows(self) -> _Parts:
        """For the native name of every tensor, the names of the diffusers tensors that it holds."""
        rows: _Parts = {"pos_embed": ("pos_embed.pos_embed",)}
        for native, diffusers in _LAYERS.items():
            rows.update(_both(native, (diffusers,)))
        for index in range(self.num_layers):
            for name, parts in self._block(index).items():
                rows[f"joint_blocks.{index}.{name}"] = tuple(
                    f"transformer_blocks.{index}.{part}" for part in parts
                )
        return rows

    def swapped(self) -> frozenset[str]:
        """The native names of the tensors with shift before scale where diffusers has scale before shift."""
        last = f"joint_blocks.{self.num_layers - 1}.context_block.adaLN_modulation.1"
        modulations = ("final_layer.adaLN_modulation.1", last)
        return frozenset(f"{name}.{kind}" for name in modulations for kind in ("weight", "bias"))

    def _block(self, index: int) -> _Parts:
        dual, last = index in self.dual_attention_layers, index == self.num_layers - 1
        layers = _BLOCK | ({} if last else _TEXT_OUTPUT) | (_DUAL if dual else {})
        norms = (_QK_NORM | (_DUAL_QK_NORM if dual else {})) if self.qk_norm else {}
        block: _Parts = {f"{native}.weight": (f"{part}.weight",) for native, part in norms.items()}
        for native, parts in layers.items():
            block.update(_both(native, parts))
        return block


def keys_of(diffusers: Collection[str]) -> Sd3Keys:
    """What the names of a transformer's tensors in diffusers show."""
    return Sd3Keys(
        num_layers=sum(name.endswith(".attn.to_q.weight") for name in diffusers),
        qk_norm=any(name.endswith(".attn.norm_q.weight") for name in diffusers),
        dual_attention_layers=tuple(
            sorted(int(name.split(".")[1]) for name in diffusers if name.endswith(".attn2.to_q.weight"))
        ),
    )


def native_names(diffusers: Collection[str]) -> dict[str, NativeName]:
    """Where Stability's files hold each tensor of a transformer, by its name in diffusers."""
    keys = keys_of(diffusers)
    return native_names_of(keys.rows(), keys.swapped())


def to_diffusers(native: TensorSource, keys: Sd3Keys) -> TensorSource:
    """The same weights under diffusers' names. No weight is read yet.

    Raises:
        CheckpointError: a tensor is missing or unknown, or cannot be split evenly.
    """
    rows, order = keys.rows(), keys.swapped()
    check_names(set(native), set(rows), hint=FOREIGN)
    entries: dict[str, TensorEntry] = {}
    for name, parts in rows.items():
        whole = swapped(name, native.entry(name)) if name in order else native.entry(name)
        entries.update(zip(parts, split(name, whole, len(parts)), strict=True))
    return TensorSource(entries)


def to_native(diffusers: TensorSource, keys: Sd3Keys) -> TensorSource:
    """The same weights under Stability's names. Raises CheckpointError if a tensor is missing or unknown."""
    rows, order = keys.rows(), keys.swapped()
    check_names(set(diffusers), {part for parts in rows.values() for part in parts}, hint=FOREIGN)
    entries: dict[str, TensorEntry] = {}
    for name, parts in rows.items():
        whole = joined([diffusers.entry(part) for part in parts])
        entries[name] = swapped(name, whole) if name in order else whole
    return TensorSource(entries)


def _both(native: str, parts: tuple[str, ...]) -> _Parts:
    return {f"{native}.{kind}": tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias")}
