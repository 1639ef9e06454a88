"""Perturbed-attention guidance (PAG, arXiv 2403.17377) of a Sana checkpoint: its layers and its defaults.

In the layers that PAG names, self-attention of a gated row is the identity: each token keeps its own value. diffusers
0.42.1 does this in SanaPAGPipeline, whose names and defaults are used here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ditc.export.families.sana.config import SanaConfig
from ditc.runtime.bundle.manifest import PerturbedAttentionGuidance
from ditc.runtime.errors import CheckpointError

# The defaults of SanaPAGPipeline and of its __call__, diffusers 0.42.1.
PAG_APPLIED_LAYERS = ("transformer_blocks.8",)
PAG_SCALE = 3.0
PAG_ADAPTIVE_SCALE = 0.0

# A block as diffusers names it, with or without the name of its self-attention.
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d{1,4})(?:\.attn1)?")
KEYS = ("pag_applied_layers", "pag_scale", "pag_adaptive_scale")


def read_perturbed_attention(
    given: Mapping[str, Any], transformer: SanaConfig, *, is_pag_pipeline: bool
) -> PerturbedAttentionGuidance | None:
    """Perturbed-attention guidance of a checkpoint; None for one without layers for it.

    Args:
        given: the content of ditc.json.
        is_pag_pipeline: whether model_index.json names diffusers' SanaPAGPipeline, which has layers by default.

    Raises:
        CheckpointError: a layer is not a block of the network, there are settings but no layers, or the network embeds
            its guidance.
    """
    named = given.get("pag_applied_layers", PAG_APPLIED_LAYERS if is_pag_pipeline else ())
    layers = tuple(sorted({_block_number(name) for name in ([named] if isinstance(named, str) else named)}))
    settings = [key for key in KEYS if key in given]
    if transformer.guidance_embeds and settings:
        raise CheckpointError(
            f"ditc.json has {settings[0]}, but guidance is a part of this network (guidance_embeds is true)",
            hint=f"remove {', '.join(settings)}: SANA-Sprint draws without perturbed-attention guidance",
        )
    if not layers:
        if others := [key for key in settings if key != "pag_applied_layers"]:
            raise CheckpointError(
                f"ditc.json has {others[0]}, but no layers for perturbed-attention guidance",
                hint=f'add "pag_applied_layers": "{PAG_APPLIED_LAYERS[0]}", or remove {others[0]}',
            )
        return None
    foreign = [layer for layer in layers if layer >= transformer.num_layers]
    if foreign:
        raise CheckpointError(
            f"pag_applied_layers names blocks {foreign}, but the network has blocks 0 to {transformer.num_layers - 1}",
            hint="name blocks of this network in ditc.json; diffusers' default for Sana is "
            f'"pag_applied_layers": "{PAG_APPLIED_LAYERS[0]}"',
        )
    return PerturbedAttentionGuidance(
        layers=layers,
        scale=float(given.get("pag_scale", PAG_SCALE)),
        adaptive_scale=float(given.get("pag_adaptive_scale", PAG_ADAPTIVE_SCALE)),
    )


def _block_number(name: str | int) -> int:
    if isinstance(name, int):
        return name
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"pag_applied_layers has {name!r:.80}, which names no block",
            hint='write one name for each block, such as "transformer_blocks.8"; patterns are not read',
        )
    return int(match[1])
