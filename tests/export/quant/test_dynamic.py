"""int8-dynamic: its recipe, the options that do not fit it, and what int8 without ranges suggests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.export.build.preflight import check_options
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.quant.apply import prepare
from ditc.export.quant.recipes import find_recipe
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import DENOISER, Backend, Precision

DYNAMIC = Precision.INT8_DYNAMIC


@pytest.mark.parametrize("family", ["sana", "sd3", "mmdit"])
def test_it_quantizes_the_layers_of_static_int8_without_ranges(family: str) -> None:
    static, dynamic = (find_recipe(None, precision, family) for precision in (Precision.INT8, DYNAMIC))
    assert [(r.layers, r.kind) for r in dynamic.rules] == [(r.layers, r.kind) for r in static.rules]
    assert all(rule.per_token is (rule.kind is not None) for rule in dynamic.rules)
    assert static.needs_ranges and not dynamic.needs_ranges
    assert (static.precision, dynamic.precision) == (Precision.INT8, DYNAMIC)


def test_recipes_of_fp8_and_of_weights_alone_are_refused() -> None:
    with pytest.raises(UsageError, match="has FP8 layers, but an int8-dynamic build"):
        find_recipe("sana-fp8", DYNAMIC, "sana")
    with pytest.raises(UsageError, match="leaves activations as they are, but int8-dynamic quantizes them"):
        find_recipe("int8-weight-only", DYNAMIC, "sana")


@pytest.mark.parametrize("backend", [Backend.TENSORRT, Backend.TENSORRT_RTX])
def test_engines_are_refused_by_name(backend: Backend) -> None:
    with pytest.raises(UsageError, match=f"int8-dynamic is not made for {backend}") as caught:
        check_options(BuildOptions(backend=backend, precision=DYNAMIC))
    assert "--precision int8" in str(caught.value.hint) and "onnxruntime or openvino" in str(
        caught.value.hint
    )


@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.OPENVINO])
def test_its_other_parts_are_fp32(backend: Backend) -> None:
    assert BuildOptions(backend=backend, precision=DYNAMIC).base is Precision.FP32
    sixteen = BuildOptions(backend=backend, precision=DYNAMIC, base_precision=Precision.BF16)
    with pytest.raises(UsageError, match="--base-precision bf16 does not fit int8-dynamic"):
        check_options(sixteen)


def test_int8_without_ranges_suggests_it_where_the_backend_has_it(tiny_checkpoint: Path) -> None:
    assert "--precision int8-dynamic" in _hint(tiny_checkpoint, Backend.ONNXRUNTIME)
    assert "ditc calibrate" in _hint(tiny_checkpoint, Backend.ONNXRUNTIME)
    assert "int8-dynamic" not in _hint(tiny_checkpoint, Backend.TENSORRT_RTX)


def test_a_build_needs_no_ranges(tiny_checkpoint: Path) -> None:
    found = _prepare(tiny_checkpoint, BuildOptions(precision=DYNAMIC))[DENOISER]
    assert (found.precision, found.ranges, found.calibration) == (DYNAMIC, None, None)


def _hint(checkpoint: Path, backend: Backend) -> str:
    with pytest.raises(UsageError, match="needs --ranges") as caught:
        _prepare(checkpoint, BuildOptions(precision=Precision.INT8, backend=backend))
    return str(caught.value.hint)


def _prepare(path: Path, options: BuildOptions):
    checkpoint = open_checkpoint(path)
    plan = find_adapter(checkpoint).plan(checkpoint, options)
    return prepare(options, checkpoint, plan)
