"""Golden inputs and outputs of a stage: a self-test on the target machine, which needs nothing but the bundle.

    golden/STAGE-KEY.safetensors    tensors "in.NAME" and "out.NAME"; metadata "ditc.golden", JSON

To keep the files small, an input is stored as a few values, which are repeated to fill its shape, and only every
stride-th value of an output is stored. A conditioning tensor of 50 MB takes 100 KB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.runtime.bundle.certificate import Line
from ditc.runtime.bundle.jsondata import from_json
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.bundle.safetensors import read_safetensors
from ditc.runtime.errors import BundleError, DitcError
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array, Session, numpy_dtype, to_numpy
from ditc.runtime.spec import DType
from ditc.runtime.tolerances import Level, Metric, limit

METADATA = "ditc.golden"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenInfo:
    """The metadata of a golden file.

    Attributes:
        inputs, outputs: the full shapes of the tensors, by name.
        strides: for each output, the distance between two stored values.
        losses: for each precision, the relative L2 error of PyTorch itself on these inputs, of the worst output.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    strides: dict[str, int]
    losses: dict[str, float]


@dataclass(frozen=True, slots=True)
class Golden:
    """The test of one stage: full inputs, and every stride-th value of the fp32 outputs."""

    info: GoldenInfo
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def read_golden(path: Path) -> Golden:
    """Read the golden file of one stage.

    Raises:
        BundleError: the file is damaged.
    """
    tensors, metadata = read_safetensors(path)
    try:
        info = from_json(GoldenInfo, json.loads(metadata[METADATA]))
        inputs = {name: np.resize(tensors[f"in.{name}"], shape) for name, shape in info.inputs.items()}
        outputs = {name: tensors[f"out.{name}"] for name in info.outputs}
        _check_consistent(info, outputs)
    except (ValueError, KeyError) as e:
        raise BundleError(f"{path} holds no golden values: {e}", hint="rebuild the bundle") from e
    return Golden(info, inputs, outputs)


def _check_consistent(info: GoldenInfo, outputs: Mapping[str, Array]) -> None:
    """Raise ValueError unless the outputs have the stored number of values, and the errors are errors."""
    for name, array in outputs.items():
        size, stride = math.prod(info.outputs[name]), info.strides[name]
        if stride < 1 or array.size != -(-size // stride):
            raise ValueError(f"{name} has {array.size} values of {size} with a stride of {stride}")
    for precision, loss in info.losses.items():
        if not 0 <= loss < math.inf:
            raise ValueError(f"the error of PyTorch in {precision} is {loss}")


def self_test(stage: str, session: Session, artifact: Artifact, golden: Golden) -> Line:
    """Run one stage on its golden inputs, and compare its worst output with the tolerance of the artifact's precision.

    A stage that cannot run, or whose outputs have another shape, NaN or Inf, has failed.
    """
    try:
        got = session.run(_feeds(session, golden))
    except DitcError as e:
        return Line(
            name=stage, metric=Metric.RELATIVE_L2, value=None, bound=None, passed=False, detail=str(e)
        )
    if why := _why_not_comparable(session, golden):
        return Line(name=stage, metric=Metric.RELATIVE_L2, value=None, bound=None, passed=None, detail=why)
    worst, detail = 0.0, ""
    for name in (spec.name for spec in session.spec.outputs):
        array, wanted = widened(to_numpy(got[name])), golden.outputs[name]
        if array.shape != golden.info.outputs[name] or not np.isfinite(array).all():
            problem = (
                f"{name} has NaN or Inf"
                if array.shape == golden.info.outputs[name]
                else f"{name} has shape {array.shape}, not {golden.info.outputs[name]}"
            )
            return Line(
                name=stage, metric=Metric.RELATIVE_L2, value=None, bound=None, passed=False, detail=problem
            )
        error = relative_l2(array.ravel()[:: golden.info.strides[name]], wanted)
        if error >= worst:
            worst, detail = error, name
    return _compare_with_tolerance(stage, worst, detail, session, artifact, golden)


def _why_not_comparable(session: Session, golden: Golden) -> str:
    """Why the golden outputs cannot show that the stage is right; "" if they can."""
    if lacking := [spec.name for spec in session.spec.outputs if spec.name not in golden.outputs]:
        return f"the golden file has no values of {', '.join(lacking)}"
    unusable = [name for name, array in golden.outputs.items() if not np.isfinite(array).all()]
    return f"the golden values of {unusable[0]} have NaN or Inf" if unusable else ""


def _compare_with_tolerance(
    stage: str, error: float, output: str, session: Session, artifact: Artifact, golden: Golden
) -> Line:
    precision = artifact.precision
    bound = limit(Level.STAGE, Metric.RELATIVE_L2, precision, pytorch=golden.info.losses.get(precision.value))
    passed: bool | None = None if bound is None else error <= bound.bound
    if bound is None:
        output += f": the file records no error of PyTorch in {precision.value}"
    elif passed and session.device.widens(precision):
        passed, output = None, f"{output}: {session.device.name} computes {precision.value} in fp32"
    return Line(
        name=stage,
        metric=Metric.RELATIVE_L2,
        value=error,
        bound=bound.bound if bound else None,
        passed=passed,
        detail=output,
    )


def _feeds(session: Session, golden: Golden) -> dict[str, Array]:
    feeds = {}
    for spec in session.spec.inputs:
        array = golden.inputs[spec.name]
        if spec.dtype is DType.BFLOAT16:
            # Golden inputs have at most 8 bits of mantissa, so the upper half of their fp32 bits is the exact value.
            array = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        feeds[spec.name] = array.astype(numpy_dtype(spec.dtype))
    return feeds
