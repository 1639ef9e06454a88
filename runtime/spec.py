"""The vocabulary that every part shares: what a tensor, a profile and a stage promise.

A dimension is an int (fixed) or a str (named and dynamic). Dimensions of one stage that bear the same
name are equal at run time; a Profile bounds each name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class DType(StrEnum):
    """Element types that cross a stage boundary. numpy has no bfloat16: it travels as its uint16 bits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    BOOL = "bool"


class Precision(StrEnum):
    """What the weights and GEMMs of a stage are computed in. fp32 means fp32: TF32 is a precision of its own."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


SIXTEEN_BITS = frozenset({Precision.FP16, Precision.BF16})


class Backend(str):
    """Name of a library that can execute a stage, as manifests and `--backend` write it.

    Which backends there are is the registry's to say (runtime/sessions/registry.py). A manifest may name one that this
    version of ditc does not know. Equal names are one object, so `is` compares them like members of an enumeration.

    Raises:
        ValueError: the name is not made of lower-case letters, digits and hyphens; it becomes a part of file names.
    """

    __slots__ = ()
    _names: ClassVar[dict[str, Backend]] = {}

    ONNXRUNTIME: ClassVar[Backend]
    TENSORRT_RTX: ClassVar[Backend]
    TENSORRT: ClassVar[Backend]

    def __new__(cls, name: str) -> Backend:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise ValueError(
                f"{name!r:.60} is not a backend's name: letters a to z, digits and single hyphens"
            )
        return cls._names.setdefault(str(name), super().__new__(cls, name))

    @property
    def value(self) -> str:
        """The name as plain text, as members of an enumeration give it."""
        return str(self)


Backend.ONNXRUNTIME = Backend("onnxruntime")
Backend.TENSORRT_RTX = Backend("tensorrt-rtx")
Backend.TENSORRT = Backend("tensorrt")


TEXT_ENCODER = "text_encoder"
CONDITIONER = "conditioner"
DENOISER = "denoiser"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
NETWORK = "network"  # optional: the denoiser without the step around it

Dim = int | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of one input or output."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, most likely and largest value of a named dimension; multiple_of is the step between."""

    min: int
    opt: int
    max: int
    multiple_of: int = 1

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.multiple_of == 0


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What one stage takes and gives, and inside which sizes.

    profile maps every named dimension of inputs and outputs to its Range, except names derived inside the graph.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: dict[str, Range]

    def input(self, name: str) -> TensorSpec:
        """The input of that name. Raises KeyError."""
        return next_named(self.inputs, name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name. Raises KeyError."""
        return next_named(self.outputs, name)


def next_named(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    """The spec of that name. Raises KeyError with the names there are."""
    for spec in specs:
        if spec.name == name:
            return spec
    raise KeyError(f"{name} is not among {[spec.name for spec in specs]}")
