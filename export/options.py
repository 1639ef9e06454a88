"""The options of a build. This module does not import torch: a build with nothing to do must not wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.sessions.registry import GRAPH_BACKEND, row_of
from ditc.runtime.spec import EIGHT_BITS, Backend, Precision

# 20 has Gelu as a single node, and Q/DQ of every type that we write (INT8 since 13, FP8 since 19). 23 adds Attention
# and RMSNormalization.
OPSETS = (20, 23)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user may choose for a build. Where None is allowed, it means the default that is named here.

    Attributes:
        precision: precision of the denoiser. The adapter's rule derives those of the other stages from it.
        backend: what the bundle is built for.
        variant: variant of the checkpoint's weight files, such as "fp16"; None for the files without a variant.
        resolution: nominal square size in pixels, for checkpoints that serve several; None for the checkpoint's own.
        max_batch: the most samples in one run of the denoiser.
        targets: GPU targets of the engines, such as "sm89"; empty for the backend's default.
        raw: whether to export the network alone too, without the step around it.
        recipes: names or .json files of recipes, at most one per stage. An int8 or fp8 denoiser without one takes the
            precision's default; any other stage is in 8 bits only if a recipe says so.
        ranges: files of calibrated ranges, at most one per stage.
        base_precision: precision of the denoiser outside its 8-bit GEMMs, from which that of other stages with a recipe
            follows; None for fp32 in ONNX Runtime, fp16 in engines and bf16 in OpenVINO. That of int8-dynamic is fp32.
        opset: opset of the ONNX graphs.
        linear_attention: whether engines compute the linear attention with standard ops or with ditc's plugin.
        weight_streaming: whether an engine's weights may stay on the host (`ditc run --low-vram`).
        lora_inputs: whether the conditioner's and the denoiser's graphs take LoRAs as inputs.
        refit: whether LoRAs can be added to an engine's weights when the bundle is loaded.
        loras: files of LoRAs that are added to the weights, with their scales, in this order.
        controlnet: the folder of a ControlNet that is joined with the checkpoint; None for the checkpoint as it is.
    """

    precision: Precision = Precision.FP32
    backend: Backend = GRAPH_BACKEND
    variant: str | None = None
    resolution: int | None = None
    max_batch: int = 4
    targets: tuple[str, ...] = ()
    raw: bool = False
    recipes: tuple[str, ...] = ()
    ranges: tuple[Path, ...] = ()
    base_precision: Precision | None = None
    opset: int = OPSETS[0]
    linear_attention: Literal["decomposed", "plugin"] = "decomposed"
    weight_streaming: bool = False
    refit: bool = False
    lora_inputs: bool = False
    loras: tuple[LoraChoice, ...] = ()
    controlnet: Path | None = None

    @property
    def quantized(self) -> bool:
        """Whether the denoiser's GEMMs are quantized to 8 bits."""
        return self.precision in EIGHT_BITS

    @property
    def base(self) -> Precision:
        """The precision in which the networks are exported, before quantization."""
        if not self.quantized:
            return self.precision
        if self.base_precision is None and self.precision is Precision.INT8_DYNAMIC:
            return Precision.FP32
        return self.base_precision or row_of(self.backend).base_precision

    @property
    def builds_engines(self) -> bool:
        """Whether engines, for NVIDIA's GPUs, are built from the graphs."""
        return row_of(self.backend).builds_engines and row_of(self.backend).same_gpu

    @property
    def converts_graphs(self) -> bool:
        """Whether the graphs are also written in another form, which runs on any machine."""
        return row_of(self.backend).builds_engines and not row_of(self.backend).same_gpu
