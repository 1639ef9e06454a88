"""8-bit recipes of Sana: all GEMMs of a block but the cross-attention's K and V (SANA, arXiv 2410.10629, section 4)."""

from __future__ import annotations

from ditc.export.quant.recipes import NEVER_QUANTIZED, Rule, controlnet_recipes, int8_and_fp8

LAYERS = (
    "transformer_blocks.*.attn1.to_[qkv]",
    "transformer_blocks.*.attn1.to_out.0",
    "transformer_blocks.*.attn2.to_q",
    "transformer_blocks.*.attn2.to_out.0",
    "transformer_blocks.*.ff.conv_inverted",
    "transformer_blocks.*.ff.conv_point",
)
CROSS = Rule(layers="*attn2.to_[kv]", why="cross-attention K and V: they run only once per prompt")

TEMPORAL = Rule(
    layers="*ff.conv_temp", why="the convolution over frames (SANA-Video, arXiv 2509.24695, section 5)"
)

# SANA-Sprint's blocks are the same layers. Its recipes have names of their own because their ranges are measured over
# other steps: one to four, each from new noise, instead of twenty along one path.
SPRINT = "sana-sprint"
VIDEO = "sana-video"  # so are SANA-Video's, with one layer more
RECIPES = {
    name: recipe
    for family, more in (("sana", ()), (SPRINT, ()), (VIDEO, (TEMPORAL,)))
    for name, recipe in int8_and_fp8(
        family, LAYERS, kept_high_precision=(*NEVER_QUANTIZED, CROSS, *more)
    ).items()
}
RECIPES |= controlnet_recipes(
    "sana", "SanaControlNetModel", LAYERS, kept_high_precision=(*NEVER_QUANTIZED, CROSS)
)
