"""Write a stage's golden file: small seeded inputs, and the outputs that PyTorch computes from them in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import save

from ditc.export.contract import StageModule
from ditc.export.example_inputs import example_feeds
from ditc.export.graph.torch_session import TorchSession, one_thread
from ditc.runtime import step_contract
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.golden import METADATA, GoldenInfo
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array, to_numpy
from ditc.runtime.spec import SIXTEEN_BITS, DType, StageSpec

# Most values that are stored per tensor. A bundle's golden files stay below 2 MB: five stages have 16 float tensors,
# 16 * 24576 * 4 bytes = 1.6 MB. A stage with more tensors than MOST_TENSORS stores less of each.
MAX_VALUES = 24576
MOST_TENSORS = 32


def write_golden(
    reference: Callable[[], StageModule],
    path: Path,
    *,
    deployed: Callable[[], StageModule] | None = None,
    losses: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Write one stage's golden file. The two networks are loaded one after the other, because one alone may be large.

    Args:
        reference: loads the stage in fp32.
        deployed: loads the same stage in the artifact's precision, if that is 16-bit. The error that PyTorch itself has
            in this precision is recorded, because the self-test's bound is a multiple of it.
        losses: the recorded errors of other precisions, by precision; the new file keeps them.
    """
    stage = reference()
    feeds = golden_feeds(stage)
    outputs = _run(stage, feeds)
    del stage
    most = _most_values(len(feeds) + len(outputs))
    strides = {name: -(-array.size // most) for name, array in outputs.items()}
    info = GoldenInfo(
        inputs={name: array.shape for name, array in feeds.items()},
        outputs={name: array.shape for name, array in outputs.items()},
        strides=strides,
        losses={**losses, **_losses(deployed, feeds, outputs)},
    )
    tensors = {f"in.{name}": array.ravel()[:most].copy() for name, array in feeds.items()}
    tensors |= {f"out.{name}": array.ravel()[:: strides[name]].copy() for name, array in outputs.items()}
    return write_atomic(path, save(tensors, metadata={METADATA: json.dumps(to_json(info))}))


def golden_feeds(stage: StageModule) -> dict[str, Array]:
    """Inputs whose values every deployment type holds exactly. They repeat after at most MAX_VALUES values."""
    feeds = example_feeds(stage.spec, golden_sizes(stage.spec), seed=7, integers=stage.integers)
    most = _most_values(len(stage.spec.inputs) + len(stage.spec.outputs))
    return {name: np.resize(_exact(name, array).ravel()[:most], array.shape) for name, array in feeds.items()}


def _most_values(tensors: int) -> int:
    """How many values are stored per tensor of a stage with so many inputs and outputs."""
    return MAX_VALUES * MOST_TENSORS // max(MOST_TENSORS, tensors)


def _exact(name: str, array: Array) -> Array:
    """Round to multiples of 1/32 below 4. They have at most 8 significant bits, so bf16 and fp16 hold them exactly."""
    if array.dtype.kind != "f" or name == step_contract.TIMESTEP:
        return array
    return (np.clip(np.round(array * 32), -127, 127) / 32).astype(np.float32)


def golden_sizes(spec: StageSpec) -> dict[str, int]:
    """Small sizes within the profile, but more than one row, token and cell, since one alone would test too little."""
    several = {step_contract.BATCH: 1, step_contract.ROWS: 2}
    sizes = {}
    for name, bounds in spec.profile.items():
        wanted = several.get(name, 4) * bounds.multiple_of
        sizes[name] = min(max(bounds.min, wanted), bounds.max)
    return sizes


def _run(stage: StageModule, feeds: Mapping[str, Array]) -> dict[str, Array]:
    session = TorchSession(stage.module, stage.spec)
    with one_thread():
        outputs = session.run(
            {tensor.name: _fitted(feeds[tensor.name], tensor.dtype) for tensor in stage.spec.inputs}
        )
    return {name: np.array(widened(to_numpy(tensor)), np.float32) for name, tensor in outputs.items()}


def _fitted(array: Array, dtype: DType) -> Array:
    if dtype is DType.BFLOAT16:
        return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(np.float16) if dtype is DType.FLOAT16 else array


def _losses(
    deployed: Callable[[], StageModule] | None, feeds: Mapping[str, Array], wanted: Mapping[str, Array]
) -> dict[str, float]:
    if deployed is None:
        return {}
    stage = deployed()
    if stage.precision not in SIXTEEN_BITS:
        return {}
    got = _run(stage, feeds)
    worst = max(relative_l2(got[name], wanted[name]) for name in wanted)
    return {stage.precision.value: worst} if np.isfinite(worst) else {}
