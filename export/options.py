"""What the user may choose for a build. Free of torch: a build that has nothing to do must not wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.runtime.sessions.registry import GRAPH_BACKEND, row_of
from ditc.runtime.spec import Backend, Precision

# 20: Gelu as a single node; Q/DQ of every type that we write (INT8 13, FP8 19). 23: Attention and RMSNormalization.
OPSETS = (20, 23)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user may choose. Sizes in pixels; None leaves the choice to the adapter.

    Attributes:
        precision: of the denoiser; the other stages follow by the adapter's rule.
        variant: of the checkpoint's weight files ("fp16"); None for those without one.
        resolution: nominal square size, for checkpoints that serve several.
        max_batch: most samples in one run of the denoiser.
        targets: SMs to build engines for ("sm89"); empty for the backend's default.
        raw: also export the network alone, without the step around it.
        recipe: of an int8 or fp8 denoiser: a name or a .json file; None for the precision's default.
        ranges: file of calibrated ranges for the recipe.
        base_precision: what an int8 or fp8 denoiser computes in outside its 8-bit GEMMs; None for fp32 in ONNX
            Runtime and fp16 in engines.
        opset: of the ONNX graphs.
        linear_attention: what engines compute it with: standard ops, or ditc's plugin.
        weight_streaming: engines whose weights may stay on the host (`ditc run --low-vram`).
    """

    precision: Precision = Precision.FP32
    backend: Backend = GRAPH_BACKEND
    variant: str | None = None
    resolution: int | None = None
    max_batch: int = 4
    targets: tuple[str, ...] = ()
    raw: bool = False
    recipe: str | None = None
    ranges: Path | None = None
    base_precision: Precision | None = None
    opset: int = OPSETS[0]
    linear_attention: Literal["decomposed", "plugin"] = "decomposed"
    weight_streaming: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the denoiser's GEMMs become 8 bits."""
        return self.precision in (Precision.INT8, Precision.FP8)

    @property
    def base(self) -> Precision:
        """What the networks are exported in, before quantization."""
        if not self.quantized:
            return self.precision
        return self.base_precision or (Precision.FP16 if self.builds_engines else Precision.FP32)

    @property
    def builds_engines(self) -> bool:
        """Whether engines are built from the graphs."""
        return row_of(self.backend).builds_engines
