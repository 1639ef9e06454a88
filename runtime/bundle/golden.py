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
from ditc.runtime.bundle.jsondata import check_numbers, from_json
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.bundle.safetensors import read_safetensors
from ditc.runtime.errors import BundleError, DitcError
from ditc.runtime.limits import MAX_VALUES
from ditc.runtime.metrics import relative_l2, widened
from ditc.runtime.session import Array, Session, numpy_dtype, to_numpy
from ditc.runtime.spec import DType, StageSpec
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
        data = json.loads(metadata[METADATA])
        check_numbers(data)
        info = from_json(GoldenInfo, data)
        _check_info(info, tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as e:  # Mismatch is a ValueError
        raise BundleError(f"{path} holds no golden values: {e}", hint="rebuild the bundle") from e
    inputs = {name: np.resize(tensors[f"in.{name}"], shape) for name, shape in info.inputs.items()}
    outputs = {name: tensors[f"out.{name}"] for name in info.outputs}
    return Golden(info, inputs, outputs)


def _check_info(info: GoldenInfo, tensors: Mapping[str, Array]) -> None:
    """Check that the metadata fits the tensors, before memory is taken for the full shapes.

    Raises:
        KeyError: a tensor or a stride is missing.
        ValueError: a number cannot be.
    """
    shapes = (*info.inputs.items(), *info.outputs.items())
    for name, shape in shapes:
        if min(shape, default=1) < 1:
            raise ValueError(f"{name} has the shape {shape}")
    total = sum(math.prod(shape) for _, shape in shapes)
    if total > MAX_VALUES:
        raise ValueError(f"its tensors have {total} values, more than {MAX_VALUES}")
    for name in info.inputs:
        if not tensors[f"in.{name}"].size:
            raise ValueError(f"{name} has no values")
    for name, shape in info.outputs.items():
        stored, stride = tensors[f"out.{name}"], info.strides[name]
        wanted = -(-math.prod(shape) // stride) if stride > 0 else 0
        if stored.shape != (wanted,) or stored.dtype != np.float32 or not np.isfinite(stored).all():
            raise ValueError(f"{name} is not every {stride}th value of {shape}, as finite fp32 numbers")
    for precision, loss in info.losses.items():
        if not 0 <= loss <= 1:
            raise ValueError(
                f"the error of PyTorch in {precision:.20} is {loss}, which is not between 0 and 1"
            )


def _check_names(golden: Golden, spec: StageSpec) -> None:
    """Raise BundleError unless the file has values for every input, and only for outputs that the stage has."""
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (spec.inputs, spec.outputs))
    if wrong := sorted((inputs - golden.inputs.keys()) | (golden.outputs.keys() - outputs)):
        raise BundleError(
            f"{spec.name}: its golden file and the manifest differ in {wrong[0]!r:.60}",
            hint="rebuild the bundle",
        )


def self_test(stage: str, session: Session, artifact: Artifact, golden: Golden) -> Line:
    """Run one stage on its golden inputs, and compare its worst output with the tolerance of the artifact's precision.

    A stage that cannot run, or whose outputs have another shape, NaN or Inf, has failed.

    Raises:
        BundleError: the golden values are not those of this stage.
    """
    _check_names(golden, session.spec)
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
