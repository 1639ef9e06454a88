"""Fidelity and speed of a quantized build are measured once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ditc.export.commands import quantization
from ditc.export.families.sana.recipe import RECIPES
from ditc.export.options import BuildOptions
from ditc.export.quant import measure as measuring
from ditc.export.quant.coverage import Coverage
from ditc.export.quant.measure import Measurement, known_measurement, save_measurement
from ditc.export.quant.record import QuantRecord
from ditc.runtime.bundle.jsondata import to_json
from ditc.runtime.bundle.manifest import FileRef, Manifest, Stage, load_manifest
from ditc.runtime.machine import library_versions, this_machine
from ditc.runtime.spec import DENOISER, Backend, Precision


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return load_manifest(tiny_bundle)


def measured(of: Manifest, **changes: object) -> Measurement:
    made = Measurement(
        manifest=of.digest,
        artifact="key",
        recipe="sana-int8",
        machine=str(this_machine()),
        versions=library_versions(),
        prompts=4,
        num_inference_steps=20,
        psnr_db=38.9,
        worst_db=24.5,
        latents_rel_l2=0.05,
        step_ms=1.0,
        base_step_ms=1.5,
        speedup=1.5,
        speedup_low=1.4,
        speedup_high=1.6,
    )
    return replace(made, **changes)


def test_a_measurement_of_this_bundle_on_this_machine_is_known(manifest: Manifest, tmp_path: Path) -> None:
    save_measurement(measured(manifest, artifact="another"), tmp_path)
    save_measurement(measured(manifest), tmp_path)
    assert known_measurement(tmp_path, manifest, "key") == measured(manifest)


@pytest.mark.parametrize(
    "changes",
    [{"manifest": "0"}, {"artifact": "0"}, {"machine": "a faster one"}, {"versions": {"ditc": "0"}}],
)
def test_a_measurement_of_anything_else_is_not_known(
    changes: dict[str, object], manifest: Manifest, tmp_path: Path
) -> None:
    save_measurement(measured(manifest, **changes), tmp_path)
    assert known_measurement(tmp_path, manifest, "key") is None


@pytest.mark.parametrize("content", ["", "{}", "[1]", "damaged"])
def test_a_file_without_measurements_gives_none(content: str, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "quantized.json").write_text(content)
    assert known_measurement(tmp_path, manifest, "key") is None


@pytest.fixture
def with_int8(manifest: Manifest, tmp_path: Path) -> Manifest:
    """The manifest with an INT8 denoiser, whose record is in tmp_path."""
    coverage = Coverage(
        layers=1, gemm_share=1, product_share=1, weight_share=1, size_bytes=1, fp16_bytes=1, high=()
    )
    record = QuantRecord(recipe=RECIPES["sana-int8"], ranges=None, coverage=coverage, inputs=(), layers={})
    (tmp_path / "record.json").write_text(json.dumps(to_json(record)))
    (graph,) = manifest.stages[DENOISER].artifacts
    int8 = replace(
        graph,
        precision=Precision.INT8,
        key="key",
        quantization=FileRef("record.json", size_bytes=0, sha256=""),
    )
    return replace(manifest, stages={**manifest.stages, DENOISER: Stage(artifacts=(graph, int8))})


def test_a_build_that_changed_nothing_measures_nothing_again(
    manifest: Manifest, with_int8: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_measurement(measured(manifest), tmp_path)

    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quantization, "measure", measure)
    assert "PSNR 38.9 dB" in "\n".join(
        quantization.report(tmp_path, with_int8, BuildOptions(precision=Precision.INT8))
    )


@pytest.mark.parametrize(
    ("backend", "missing"), [(Backend.ONNXRUNTIME, "fp32"), (Backend.TENSORRT_RTX, "fp16")]
)
def test_without_a_denoiser_to_compare_with_the_hint_names_the_one_that_fits(
    with_int8: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, missing: str
) -> None:
    """Around 8 bits, engines compute in fp16. An fp32 denoiser has other inputs and cannot take its place."""
    monkeypatch.setattr(quantization, "measure", lambda *_, **__: None)
    options = BuildOptions(precision=Precision.INT8, backend=backend)
    *_, last = quantization.report(tmp_path, with_int8, options)
    assert f"no {missing} denoiser" in last and f"--precision {missing}" in last


@pytest.mark.parametrize(("seconds", "times"), [(0.001, 20), (3.0, 4), (100.0, 4)])
def test_steps_that_take_long_are_timed_less_often(
    seconds: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps of a full-size network would add minutes to a build on a CPU."""
    now = 0.0

    class Slow:
        def time(self) -> float:
            nonlocal now
            now += seconds
            return seconds

    monkeypatch.setattr(measuring, "perf_counter", lambda: now)
    found = measuring._time_alternately({"quantized": Slow(), "unquantized": Slow()})
    assert {name: len(each) for name, each in found.items()} == {"quantized": times, "unquantized": times}
