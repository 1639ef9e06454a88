"""The weight map: which initializer of which stage holds each tensor of the checkpoint, and how it is stored there.

Every graph has one beside it, `GRAPH.onnx.weights.json`: a list of `Weight`. Whoever changes or checks weights of a
bundle (LoRA, refit, parity) goes by it, from the checkpoint's name of a tensor to the initializer's and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import from_json, to_json
from ditc.runtime.errors import BundleError
from ditc.runtime.session import Array

SUFFIX = ".weights.json"


class Transform(StrEnum):
    """One thing that was done to a tensor's values on their way from the checkpoint into the graph.

    A tensor without transforms is stored as it is.
    """

    RESHAPE = "reshape"  # the same values in row-major order under another shape
    TRANSPOSE = "transpose"  # a matrix with its axes swapped
    SMOOTH = "smooth"  # input channels multiplied by factors, which the layer's input is divided by
    QUANTIZE = "quantize"  # 8-bit codes with a scale for each output channel


# What changes the order of the values and none of them.
LOSSLESS = frozenset({Transform.RESHAPE, Transform.TRANSPOSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """How the codes of a quantized matrix are read.

    Attributes:
        axis: of the output channels.
        scale: the initializer with a scale for each of them.
        reciprocals: the initializer with one over the factor of each input channel; None where nothing is smoothed.
    """

    axis: int
    scale: str
    reciprocals: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One checkpoint tensor inside an ONNX file.

    Attributes:
        initializer: its name in the stage's graph, which is the PyTorch parameter's.
        transforms: what was done to the values, first step first.
        shape, dtype: the tensor's own, in the checkpoint.
        stored_shape: the initializer's. None in maps of earlier versions.
        codes: how a quantized matrix is read. None for every other tensor, and in maps of earlier versions.
    """

    checkpoint: str
    stage: str
    initializer: str
    transforms: tuple[Transform, ...]
    shape: tuple[int, ...]
    dtype: str
    stored_shape: tuple[int, ...] | None = None
    codes: Codes | None = None


def weight_map_path(graph: Path) -> Path:
    """Where the weight map of an ONNX file lies."""
    return graph.with_name(graph.name + SUFFIX)


def read_weight_map(path: Path) -> tuple[Weight, ...]:
    """The weights of one graph.

    Raises:
        BundleError: the file is missing or damaged.
    """
    try:
        return tuple(from_json(Weight, item) for item in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as e:  # Mismatch is a ValueError
        raise BundleError(f"{path} is not a weight map: {e}", hint="build the bundle again") from e


def write_weight_map(path: Path, weights: Iterable[Weight]) -> Path:
    """Write the weights of one graph.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomic(path, json.dumps(to_json(tuple(weights)), indent=1))


def by_checkpoint(weights: Iterable[Weight]) -> dict[str, Weight]:
    """The weights by the checkpoint's names. Names are unique within one component of a checkpoint."""
    return {weight.checkpoint: weight for weight in weights}


def apply(weight: Weight, tensor: Array, *, stored_shape: tuple[int, ...] | None = None) -> Array:
    """A tensor of the checkpoint's shape as the graph stores it, in the tensor's own type.

    Args:
        tensor: an array of NumPy or a tensor of PyTorch.
        stored_shape: the initializer's, for maps of earlier versions, which do not hold it.

    Raises:
        BundleError: the weight is stored in 8 bits, which lose what a tensor holds, or its stored shape is not known.
    """
    if not is_lossless(weight):
        raise BundleError(
            f"{weight.stage}: {weight.initializer} is stored in 8 bits", hint="build the stage without 8 bits"
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
    """An initializer's values in the checkpoint's shape. 8-bit codes become the fp32 values that they stand for.

    Args:
        stored: an array of NumPy or, unless it holds codes, a tensor of PyTorch.
        initializers: scales and factors of the graph by name, which 8-bit codes need.

    Raises:
        BundleError: the map or the graph lacks what the codes are read with.
    """
    if not is_lossless(weight):
        stored = _decoded(weight, stored, initializers or {})
    for transform in reversed(weight.transforms):
        if transform is Transform.TRANSPOSE:
            stored = stored.T
        elif transform is Transform.RESHAPE:
            stored = stored.reshape(weight.shape)
    return stored


def is_lossless(weight: Weight) -> bool:
    """Whether the initializer holds the tensor's own values, in whatever order."""
    return set(weight.transforms) <= LOSSLESS


def _decoded(weight: Weight, codes: Array, initializers: Mapping[str, Array]) -> Array:
    """Scales undone along the output channels, then the smoothing along the input channels."""
    how = weight.codes
    names = () if how is None else (how.scale, *((how.reciprocals,) if how.reciprocals else ()))
    if how is None or not set(names) <= initializers.keys():
        raise BundleError(
            f"{weight.stage}: nothing says how the codes of {weight.initializer} are read", hint="build again"
        )
    channels = initializers[how.scale].astype(np.float32)
    matrix: Array = codes.astype(np.float32) * np.expand_dims(channels, 1 - how.axis)
    if how.reciprocals is not None:
        matrix = matrix * np.expand_dims(initializers[how.reciprocals].astype(np.float32), how.axis)
    return matrix
