"""The weight map of a finished graph, and how to get the checkpoint's tensors back from a bundle's ONNX files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from ditc.export.graph.passes.lora_inputs import lora_inputs_of
from ditc.export.graph.passes.parameters import transforms_of
from ditc.export.graph.passes.qdq import codes_of
from ditc.export.networks.loading import WeightSource
from ditc.runtime.errors import BuildError
from ditc.runtime.session import Array
from ditc.runtime.weight_map import NativeName, Transform, Weight, invert, is_lossless


def weights_of(sources: Iterable[WeightSource], model: ir.Model) -> tuple[Weight, ...]:
    """The weight map of one stage's finished graph.

    Raises:
        BuildError: a parameter is not in the graph, so that the graph would ignore a tensor of the checkpoint.
    """
    return tuple(_weight(source, model) for source in sources)


def with_native_names(weights: Iterable[Weight], names: Mapping[str, NativeName]) -> tuple[Weight, ...]:
    """The weight map of a stage of the transformer, with the names of the family's own files."""
    return tuple(replace(weight, native=names.get(weight.checkpoint)) for weight in weights)


def rebuild(weights: Iterable[Weight], files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """The name and values of each checkpoint tensor, read one at a time from the stages' ONNX files.

    The values equal the checkpoint's bit for bit if the graph's type holds the checkpoint's (equal types, or fp16 or
    bf16 in fp32). Otherwise, for example with 8-bit weights, they are the values that the graph computes with,
    converted to the checkpoint's type.

    Args:
        files: the .onnx file of every stage that the weights name, with external data beside it.

    Raises:
        BuildError: a file lacks an initializer that the map names.
    """
    models = {stage: ir.load(path) for stage, path in files.items()}
    for weight in weights:
        model = models[weight.stage]
        if is_lossless(weight):
            tensor: Tensor = invert(weight, stored_tensor(_initializer(weight.initializer, model)))
        else:
            tensor = torch.from_numpy(_decoded(weight, model))
        yield weight.checkpoint, tensor.to(getattr(torch, weight.dtype)).contiguous()


def stored_tensor(value: ir.Value) -> Tensor:
    """A copy of an initializer's values in their own type.

    It is a copy because the file is mapped read-only. It is a torch tensor because NumPy has no bf16.
    """
    stored = value.const_value
    assert stored is not None
    array = np.array(stored.numpy())
    if stored.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _weight(source: WeightSource, model: ir.Model) -> Weight:
    value = model.graph.initializers.get(source.parameter)
    if value is None or value.const_value is None:
        raise BuildError(
            f"{source.stage}: the graph does not use {source.parameter}, which holds {source.checkpoint}",
            hint="the network must compute with every tensor that it loads",
        )
    codes = codes_of(value)
    # Outside the GEMM, quantized values are dequantized to the type of their scale.
    stored = value.const_value if codes is None else _initializer(codes.scale, model).const_value
    assert stored is not None
    dtype = source.dtype or to_torch_dtype(stored.dtype)
    return Weight(
        checkpoint=source.checkpoint,
        stage=source.stage,
        initializer=source.parameter,
        transforms=(*_first(source), *transforms_of(value)),
        shape=source.shape,
        dtype=str(dtype).removeprefix("torch."),
        stored_shape=tuple(map(int, value.const_value.shape.numpy())),
        codes=codes,
        lora=lora_inputs_of(value, model),
    )


def _first(source: WeightSource) -> tuple[Transform, ...]:
    """The transform that loading applied to the tensor, before any graph pass."""
    return () if source.transform == "identity" else (Transform(source.transform),)


def _decoded(weight: Weight, model: ir.Model) -> Array:
    how = weight.codes
    names = [] if how is None else [name for name in (how.scale, how.reciprocals) if name is not None]
    arrays = {name: _array(name, model) for name in (weight.initializer, *names)}
    return invert(weight, arrays[weight.initializer], arrays)


def _array(name: str, model: ir.Model) -> Array:
    value = _initializer(name, model).const_value
    assert value is not None
    return value.numpy()


def _initializer(name: str, model: ir.Model) -> ir.Value:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BuildError(f"the graph has no initializer {name}", hint="build the bundle again")
    return value
