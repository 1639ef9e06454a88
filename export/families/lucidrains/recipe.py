"""8-bit recipes of a lucidrains/mmdit trunk: attention and feedforwards, but no layer that scales every token."""

from __future__ import annotations

from ditc.export.quant.recipes import NEVER_QUANTIZED, NEVER_QUANTIZED_JOINT, Rule, int8_and_fp8

LAYERS = (
    "trunk.blocks.*.joint_attn.to_qkv.*",
    "trunk.blocks.*.joint_attn.to_out.*",
    "trunk.blocks.*.image_ff.ff.*",
    "trunk.blocks.*.text_ff.ff.*",
    "trunk.blocks.*.feedforwards.*.ff.*",
)
SCALES = (
    Rule(layers="*.to_cond.*", why="adaLN modulation: it scales every token"),
    Rule(layers="*.to_post_branch_gammas.*", why="adaLN modulation: it scales every token"),
    Rule(layers="*.to_attn_logits", why="weights of the residual streams: they scale every token"),
)

RECIPES = int8_and_fp8(
    "mmdit", LAYERS, kept_high_precision=(*NEVER_QUANTIZED, *NEVER_QUANTIZED_JOINT, *SCALES)
)
