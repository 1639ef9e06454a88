"""The weight map: which initializer of which stage holds each checkpoint tensor, and how to get the tensor back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from ditc.export.graph.passes.parameters import transforms_of
from ditc.export.graph.passes.qdq import QUANTIZE, SCALE, SMOOTH, dequantized
from ditc.export.graph.passes.transposes import TRANSPOSE
from ditc.export.networks.loading import WeightSource
from ditc.runtime.errors import BuildError

IDENTITY = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One checkpoint tensor inside an ONNX file.

    Attributes:
        initializer: its name in the stage's graph, which is the PyTorch parameter's.
        transforms: what was done to the values, first step first: "reshape" (same values in row-major order), then
            "transpose" (a matrix's axes swapped), then "smooth" and "quantize" (graph/passes/qdq.py). Empty: as it is.
        shape, dtype: the tensor's own, in the checkpoint.
    """

    checkpoint: str
    stage: str
    initializer: str
    transforms: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


def weights_of(sources: Iterable[WeightSource], model: ir.Model) -> tuple[Weight, ...]:
    """The weight map of one stage's finished graph.

    Raises:
        BuildError: a parameter is not in the graph, so the graph would ignore a tensor of the checkpoint.
    """
    return tuple(_weight(source, model) for source in sources)


def rebuild(weights: Iterable[Weight], files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Each checkpoint tensor's name and values, read from the stages' ONNX files one at a time.

    They equal the checkpoint's bit for bit if the graph's type holds the checkpoint's (fp16 or bf16 in fp32, or
    equal types); else, 8-bit weights among them, they are what the graph computes with, in the checkpoint's type.

    Args:
        files: the .onnx file of every stage that the weights name; external data lies beside it.

    Raises:
        BuildError: a file lacks an initializer that the map names.
    """
    models = {stage: ir.load(path) for stage, path in files.items()}
    for weight in weights:
        tensor = _read(weight, models[weight.stage])
        for transform in reversed([t for t in weight.transforms if t not in (QUANTIZE, SMOOTH)]):
            tensor = tensor.T if transform == TRANSPOSE else tensor.reshape(weight.shape)
        yield weight.checkpoint, tensor.to(getattr(torch, weight.dtype)).contiguous()


def _weight(source: WeightSource, model: ir.Model) -> Weight:
    value = model.graph.initializers.get(source.parameter)
    if value is None or value.const_value is None:
        raise BuildError(
            f"{source.stage}: the graph does not use {source.parameter}, which holds {source.checkpoint}",
            hint="the network must compute with every tensor that it loads",
        )
    first = () if source.transform == IDENTITY else (source.transform,)
    # Codes have the scale's type outside the GEMM.
    scale = model.graph.initializers.get(source.parameter + SCALE)
    stored = value if scale is None or scale.const_value is None else scale
    dtype = source.dtype or to_torch_dtype(stored.const_value.dtype)
    return Weight(
        checkpoint=source.checkpoint,
        stage=source.stage,
        initializer=source.parameter,
        transforms=(*first, *transforms_of(value)),
        shape=source.shape,
        dtype=str(dtype).removeprefix("torch."),
    )


def _read(weight: Weight, model: ir.Model) -> Tensor:
    value = model.graph.initializers.get(weight.initializer)
    if value is None or value.const_value is None:
        raise BuildError(f"{weight.stage}: the graph has no initializer {weight.initializer}")
    if QUANTIZE in weight.transforms:
        return torch.from_numpy(dequantized(value, model))
    stored = value.const_value
    array = np.array(stored.numpy())  # a copy of one tensor: the file is mapped read-only
    if stored.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
