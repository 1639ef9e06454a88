"""The record beside a quantized graph: recipe, plan and coverage, in `GRAPH.quantization.json`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ditc.export.quant.coverage import Coverage, measure_coverage
from ditc.export.quant.formats import Format
from ditc.export.quant.plan import Input, LayerPlan, QuantPlan
from ditc.export.quant.recipes import Recipe
from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.calibration import Calibration
from ditc.runtime.bundle.jsondata import Mismatch, from_json, to_json
from ditc.runtime.errors import BundleError
from ditc.runtime.session import Array
from ditc.runtime.spec import Precision, StageSpec

SUFFIX = ".quantization.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRecord:
    """plan.Input as JSON. smooth: base64 of little-endian fp32, one factor per channel; None for no smoothing."""

    amax: float
    alpha: float
    smooth: str | None
    per_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """One layer in 8 bits. input: index into the record's inputs; None if only the weight is quantized."""

    kind: Format
    input: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRecord:
    """How a graph was quantized. With the record and the checkpoint, PyTorch can compute what the graph should.

    Attributes:
        base: the precision of everything that is not in 8 bits; None in records of earlier versions.
        ranges: sha256 of the file of ranges; None if only weights were quantized.
        inputs: how each quantized tensor is quantized.
        layers: the layers in 8 bits, by name.
        calibration: what the ranges rest on; None if only weights were quantized.
    """

    recipe: Recipe
    ranges: str | None
    coverage: Coverage
    inputs: tuple[InputRecord, ...]
    layers: dict[str, LayerRecord]
    calibration: Calibration | None = None
    base: Precision | None = None

    @property
    def smoothed(self) -> dict[str, float]:
        """Layer -> SmoothQuant's strength, for the layers with smoothing."""
        used = {name: layer.input for name, layer in self.layers.items() if layer.input is not None}
        return {name: self.inputs[i].alpha for name, i in used.items() if self.inputs[i].alpha}

    def plans(self) -> dict[str, LayerPlan]:
        """The plan that the graph was made from, by layer.

        Raises:
            BundleError: the record contradicts itself.
        """
        try:
            inputs = [
                Input(
                    one.amax, None if one.smooth is None else _factors(one.smooth), one.alpha, one.per_token
                )
                for one in self.inputs
            ]
            return {
                name: LayerPlan(name, layer.kind, None if layer.input is None else inputs[layer.input])
                for name, layer in self.layers.items()
            }
        except (ValueError, IndexError) as e:
            raise BundleError(
                f"the record of the quantization is damaged: {e}", hint="build the bundle again"
            ) from e


def quant_record_path(graph: Path) -> Path:
    """The path of a graph's record."""
    return graph.with_name(graph.name + SUFFIX)


def write_record(
    graph: Path,
    plan: QuantPlan,
    spec: StageSpec,
    ranges: str | None,
    calibration: Calibration | None,
    base: Precision | None = None,
) -> Path:
    """Write the record of a finished graph beside it; the file appears complete or not at all."""
    inputs = list({id(layer.input): layer.input for layer in plan.layers.values() if layer.input}.values())
    record = QuantRecord(
        recipe=plan.recipe,
        ranges=ranges,
        coverage=measure_coverage(ir.load(graph), plan, spec),
        inputs=tuple(
            InputRecord(amax=i.amax, alpha=i.alpha, smooth=_text(i.smooth), per_token=i.per_token)
            for i in inputs
        ),
        layers=_layers(plan.layers, {id(one): index for index, one in enumerate(inputs)}),
        calibration=calibration,
        base=base,
    )
    return write_atomic(quant_record_path(graph), json.dumps(to_json(record), indent=1) + "\n")


def read_record(path: Path) -> QuantRecord:
    """Read the record of a graph. Raises BundleError if the file is missing or damaged."""
    try:
        return from_json(QuantRecord, json.loads(path.read_bytes()))
    except (OSError, ValueError, Mismatch) as e:
        raise BundleError(
            f"{path} is not a record of a quantization: {e}", hint="build the bundle again"
        ) from e


def _layers(plans: Mapping[str, LayerPlan], index_of: Mapping[int, int]) -> dict[str, LayerRecord]:
    return {
        name: LayerRecord(kind=plan.kind, input=None if plan.input is None else index_of[id(plan.input)])
        for name, plan in plans.items()
    }


def _text(factors: Array | None) -> str | None:
    return None if factors is None else base64.b64encode(factors.astype("<f4").tobytes()).decode()


def _factors(text: str) -> Array:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
