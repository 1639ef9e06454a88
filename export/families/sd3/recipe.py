"""8-bit recipes of SD3 and SD3.5: all Linears of a block except its modulations."""

from __future__ import annotations

from ditc.export.quant.recipes import (
    NEVER_QUANTIZED,
    NEVER_QUANTIZED_JOINT,
    controlnet_recipes,
    int8_and_fp8,
)

# attn2 is not cross-attention here, but the image's second self-attention, which runs in every step.
LAYERS = (
    "transformer_blocks.*.attn.to_[qkv]",
    "transformer_blocks.*.attn.add_[qkv]_proj",
    "transformer_blocks.*.attn.to_out.0",
    "transformer_blocks.*.attn.to_add_out",
    "transformer_blocks.*.attn2.to_[qkv]",
    "transformer_blocks.*.attn2.to_out.0",
    "transformer_blocks.*.ff.net.*",
    "transformer_blocks.*.ff_context.net.*",
)

KEPT = (*NEVER_QUANTIZED, *NEVER_QUANTIZED_JOINT)
RECIPES = {
    **int8_and_fp8("sd3", LAYERS, kept_high_precision=KEPT),
    **controlnet_recipes("sd3", "SD3ControlNetModel", LAYERS, kept_high_precision=KEPT),
}
