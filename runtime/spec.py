"""The vocabulary that all parts share: element types, precisions, backends, and the specs of tensors and stages.

A dimension is an int (fixed) or a str (named and dynamic). Dimensions of one stage that have the same name are equal at
run time, and the stage's profile bounds each name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from ditc.runtime.bundle.jsondata import LEFT_OUT_IF_NONE


class DType(StrEnum):
    """Element types of tensors between stages. numpy has no bfloat16: such a tensor is a uint16 array of its bits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    BOOL = "bool"


class Precision(StrEnum):
    """Precision of a stage's weights and matrix products. FP32 never uses TF32, which is a precision of its own.

    INT8 quantizes activations with ranges that were measured before. INT8_DYNAMIC measures each token when it runs,
    which is closer to fp32 and comes first for that reason.
    """

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_DYNAMIC = "int8-dynamic"
    INT8 = "int8"
    FP8 = "fp8"


SIXTEEN_BITS = frozenset({Precision.FP16, Precision.BF16})
EIGHT_BITS = frozenset({Precision.INT8_DYNAMIC, Precision.INT8, Precision.FP8})


class Backend(str):
    """Name of a library that can run a stage, as manifests and `--backend` write it.

    The backends of this version of ditc are listed in runtime/sessions/registry.py; a manifest may name another one.
    Equal names are one object, so they can be compared with `is`, like the members of an enum.

    Raises:
        ValueError: the name is not made of lower-case letters, digits and single hyphens alone. It becomes part of file
            names.
    """

    __slots__ = ()
    _names: ClassVar[dict[str, Backend]] = {}

    ONNXRUNTIME: ClassVar[Backend]
    TENSORRT_RTX: ClassVar[Backend]
    TENSORRT: ClassVar[Backend]
    OPENVINO: ClassVar[Backend]

    def __new__(cls, name: str) -> Backend:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError(
                f"{name!r:.60} is not a backend's name: use letters a to z, digits and single hyphens"
            )
        return cls._names.setdefault(str(name), super().__new__(cls, name))

    @property
    def value(self) -> str:
        """The name as plain text, like the value of an enum member."""
        return str(self)


Backend.ONNXRUNTIME = Backend("onnxruntime")
Backend.TENSORRT_RTX = Backend("tensorrt-rtx")
Backend.TENSORRT = Backend("tensorrt")
Backend.OPENVINO = Backend("openvino")


TEXT_ENCODER = "text_encoder"
CONDITIONER = "conditioner"
DENOISER = "denoiser"
VAE_DECODER = "vae_decoder"
VAE_DECODER_NEXT = "vae_decoder_next"  # of videos: decodes every latent frame after the first
VAE_ENCODER = "vae_encoder"
NETWORK = "network"  # optional: the denoiser without the step around it
CONTROLNET = "controlnet"  # optional: runs before the denoiser in every step that a control picture guides
CONTROL_CONDITIONER = "control_conditioner"  # optional: what a ControlNet computes from the text alone

Dim = int | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of one input or output."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, most likely and largest value of a named dimension. Every value is a multiple of multiple_of.

    Attributes:
        varies: whether the value differs from text to text, so that a library which compiles for fixed sizes leaves
            this one open.
    """

    min: int
    opt: int
    max: int
    multiple_of: int = 1
    varies: bool | None = field(default=None, kw_only=True, metadata=LEFT_OUT_IF_NONE)

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.multiple_of == 0


@dataclass(frozen=True, slots=True)
class StageSpec:
    """The inputs and outputs of one stage, and the sizes that it accepts.

    Attributes:
        profile: the Range of every named dimension, except dimensions that the graph computes by itself.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: dict[str, Range]

    def input(self, name: str) -> TensorSpec:
        """The input with this name. Raises KeyError if there is none."""
        return spec_named(self.inputs, name)

    def output(self, name: str) -> TensorSpec:
        """The output with this name. Raises KeyError if there is none."""
        return spec_named(self.outputs, name)


def spec_named(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    """The spec with this name. Raises KeyError, which lists the names, if there is none."""
    for spec in specs:
        if spec.name == name:
            return spec
    raise KeyError(f"{name} is not among {[spec.name for spec in specs]}")
