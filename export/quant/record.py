"""What is written beside a quantized graph: recipe, ranges and coverage, as `GRAPH.quantization.json`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ditc.export.quant.coverage import Coverage, measure_coverage
from ditc.export.quant.plan import QuantPlan
from ditc.export.quant.recipes import Recipe
from ditc.runtime.errors import BundleError
from ditc.runtime.jsondata import Mismatch, from_json, to_json
from ditc.runtime.spec import StageSpec

SUFFIX = ".quantization.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRecord:
    """How a graph was quantized.

    Attributes:
        smoothed: layer -> SmoothQuant's strength, where it is not 0.
        ranges: sha256 of the ranges' file, None where weights alone were quantized.
    """

    recipe: Recipe
    ranges: str | None
    coverage: Coverage
    smoothed: dict[str, float]


def write_record(graph: Path, plan: QuantPlan, spec: StageSpec, ranges: str | None) -> Path:
    """Write the record of a finished graph beside it, in one move."""
    record = QuantRecord(
        recipe=plan.recipe,
        ranges=ranges,
        coverage=measure_coverage(ir.load(graph), plan, spec),
        smoothed={
            n: layer.input.alpha for n, layer in plan.layers.items() if layer.input and layer.input.alpha
        },
    )
    path = graph.with_name(graph.name + SUFFIX)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_record(path: Path) -> QuantRecord:
    """Raises BundleError: the file is missing or damaged."""
    try:
        return from_json(QuantRecord, json.loads(path.read_bytes()))
    except (OSError, ValueError, Mismatch) as e:
        raise BundleError(f"{path} is no record of a quantization: {e}", hint="build the bundle again") from e
