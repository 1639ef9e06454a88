"""The weight map: which initializer of which stage holds each tensor of the checkpoint, and how it is stored there.

Every graph has its map beside it, `GRAPH.onnx.weights.json`, which is a list of `Weight`. Code that changes or checks
the weights of a bundle (LoRA, refit, parity) uses it to find the initializer of a tensor, or the tensor of an
initializer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import check_numbers, from_json, to_json
from ditc.runtime.errors import BundleError
from ditc.runtime.session import Array

SUFFIX = ".weights.json"
# What the names of a graph's optional inputs for LoRAs end with, after that of the initializer.
LORA_DOWN, LORA_UP = ".lora_down", ".lora_up"


class Transform(StrEnum):
    """One operation on a tensor's values between the checkpoint and the graph.

    A tensor without transforms is stored unchanged.
    """

    RESHAPE = "reshape"  # the same values in row-major order under another shape
    TRANSPOSE = "transpose"  # a matrix with its axes swapped
    SMOOTH = "smooth"  # input channels multiplied by factors, by which the layer's input is divided
    QUANTIZE = "quantize"  # 8-bit quantized values with one scale per output channel


# Transforms that change the order of the values, but not the values.
LOSSLESS = frozenset({Transform.RESHAPE, Transform.TRANSPOSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """How the quantized values (codes) of a matrix are turned back into floats.

    Attributes:
        axis: the axis of the output channels.
        scale: name of the initializer with one scale per output channel.
        reciprocals: name of the initializer with 1 / factor for each input channel; None without smoothing.
    """

    axis: int
    scale: str
    reciprocals: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeName:
    """Where the family's own files hold a tensor of the checkpoint.

    Attributes:
        name: the tensor's name there.
        part: which one of the equal parts of that tensor's first dimension it is, from 0 on.
        parts: how many parts there are: 3 where q, k and v are one tensor.
        swapped: whether the two halves of that tensor's first dimension are exchanged before it is divided.
    """

    name: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraInputs:
    """The names of a graph's optional inputs for the LoRA of a matrix: the product is x @ W + (x @ down) @ up.

    Attributes:
        down: A transposed, (input channels, rank).
        up: B transposed, with all factors, (rank, output channels).
    """

    down: str
    up: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the checkpoint inside an ONNX file.

    Attributes:
        checkpoint: the tensor's name in the checkpoint.
        initializer: its name in the stage's graph, which is also the name of the PyTorch parameter.
        transforms: the operations on the values, in the order in which they were done.
        shape, dtype: the tensor's shape and type in the checkpoint.
        stored_shape: the initializer's shape. None in maps of earlier versions.
        codes: how a quantized matrix is turned back into floats. None for all other tensors, and in maps of earlier
            versions.
        native: where the family's own files hold it. None if they do not, and in maps of earlier versions.
        lora: the graph's inputs for LoRAs of this tensor. None if LoRAs can only be added to its values.
    """

    checkpoint: str
    stage: str
    initializer: str
    transforms: tuple[Transform, ...]
    shape: tuple[int, ...]
    dtype: str
    stored_shape: tuple[int, ...] | None = None
    codes: Codes | None = None
    native: NativeName | None = field(default=None, metadata={"left_out_if_none": True})
    lora: LoraInputs | None = field(default=None, metadata={"left_out_if_none": True})


def weight_map_path(graph: Path) -> Path:
    """The path of an ONNX file's weight map."""
    return graph.with_name(graph.name + SUFFIX)


def read_weight_map(path: Path) -> tuple[Weight, ...]:
    """The weights of one graph.

    Raises:
        BundleError: the file is missing or damaged.
    """
    try:
        data = json.loads(path.read_bytes())
        check_numbers(data)
        weights = from_json(tuple[Weight, ...], data)
        for weight in weights:
            _check_shapes(weight)
        return weights
    except (OSError, ValueError, TypeError, RecursionError) as e:  # Mismatch is a ValueError
        raise BundleError(f"{path} is not a weight map: {e}", hint="build the bundle again") from e


def _check_shapes(weight: Weight) -> None:
    """Raise ValueError if the shapes do not fit each other, or an axis is not one of a matrix."""
    stored = weight.stored_shape
    sizes = {math.prod(shape) for shape in (weight.shape, stored) if shape is not None}
    if len(sizes) > 1 or min((*weight.shape, *(stored or ())), default=0) < 0:
        raise ValueError(f"{weight.initializer} has the shape {stored}, but {weight.shape} in the checkpoint")
    if weight.codes is not None and weight.codes.axis not in (0, 1):
        raise ValueError(f"{weight.initializer} has the axis {weight.codes.axis}, but a matrix has 0 and 1")
    if len(weight.transforms) > len(Transform):
        raise ValueError(f"{weight.initializer} has {len(weight.transforms)} transforms")
    native = weight.native
    if native is not None and not 0 <= native.part < native.parts:
        raise ValueError(f"{weight.initializer} is part {native.part} of {native.parts} of {native.name}")


def write_weight_map(path: Path, weights: Iterable[Weight]) -> Path:
    """Write the weights of one graph.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomic(path, json.dumps(to_json(tuple(weights)), indent=1))


def apply(weight: Weight, tensor: Array, *, stored_shape: tuple[int, ...] | None = None) -> Array:
    """Convert a tensor from the checkpoint's shape to the form that the graph stores, without changing its type.

    Args:
        tensor: a NumPy array or a PyTorch tensor.
        stored_shape: the initializer's shape, needed for maps of earlier versions, which do not hold it.

    Raises:
        BundleError: the weight is stored in 8 bits, so that it cannot be replaced exactly, or its stored shape is not
            known.
    """
    if not is_lossless(weight):
        raise BundleError(
            f"{weight.stage}: {weight.initializer} is stored in 8 bits",
            hint="build the stage in a precision other than int8 and fp8",
        )
    swapped = Transform.TRANSPOSE in weight.transforms
    for transform in weight.transforms:
        if transform is Transform.RESHAPE:
            stored = weight.stored_shape or stored_shape
            if stored is None:
                raise BundleError(
                    f"{weight.stage}: the weight map does not hold the shape of {weight.initializer}",
                    hint="build the bundle again",
                )
            tensor = tensor.reshape(tuple(reversed(stored)) if swapped else stored)
        else:
            tensor = tensor.T
    return tensor


def invert(weight: Weight, stored: Array, initializers: Mapping[str, Array] | None = None) -> Array:
    """Convert an initializer's values to the checkpoint's shape. 8-bit values are dequantized to fp32.

    Args:
        stored: a NumPy array or, unless its values are quantized, a PyTorch tensor.
        initializers: the graph's scales and reciprocals by name, needed for 8-bit values.

    Raises:
        BundleError: the map or the graph lacks what is needed to dequantize the values.
    """
    if not is_lossless(weight):
        stored = _dequantized(weight, stored, initializers or {})
    for transform in reversed(weight.transforms):
        if transform is Transform.TRANSPOSE:
            stored = stored.T
        elif transform is Transform.RESHAPE:
            stored = stored.reshape(weight.shape)
    return stored


def is_lossless(weight: Weight) -> bool:
    """Whether the initializer holds exactly the tensor's values, in any order."""
    return set(weight.transforms) <= LOSSLESS


def _dequantized(weight: Weight, quantized: Array, initializers: Mapping[str, Array]) -> Array:
    """Undo the scales along the output channels, then the smoothing along the input channels."""
    how = weight.codes
    names = () if how is None else (how.scale, *((how.reciprocals,) if how.reciprocals else ()))
    if how is None or not set(names) <= initializers.keys():
        raise BundleError(
            f"{weight.stage}: the scales of {weight.initializer}, which is stored in 8 bits, are not known",
            hint="build the bundle again",
        )
    channels = initializers[how.scale].astype(np.float32)
    others = [axis for axis in range(quantized.ndim) if axis != how.axis]
    matrix: Array = quantized.astype(np.float32) * np.expand_dims(channels, others)
    if how.reciprocals is not None:
        matrix = matrix * np.expand_dims(initializers[how.reciprocals].astype(np.float32), how.axis)
    return matrix
