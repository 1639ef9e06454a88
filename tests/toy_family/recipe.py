"""The toy family in 8 bits."""

from __future__ import annotations

from ditc.export.quant.recipes import NEVER_QUANTIZED, int8_and_fp8

RECIPES = int8_and_fp8("toy", ("toys.*",), kept_high_precision=NEVER_QUANTIZED)
