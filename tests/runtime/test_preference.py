"""The order in which "auto" tries backends: what can run, then what is known to be faster, then the precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ditc.runtime.bundle.bench_record import BenchEntry, CaseTimes, Measured, Spread
from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.machine import this_machine
from ditc.runtime.preference import in_order
from ditc.runtime.sessions import openvino_library
from ditc.runtime.sessions.registry import rows
from ditc.runtime.spec import DENOISER, Backend, Precision

ORT, OV, TRT = Backend.ONNXRUNTIME, Backend.OPENVINO, Backend.TENSORRT
ALL = [row.name for row in rows()]


@pytest.fixture
def order(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    some = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]

    def denoiser(name: str) -> Artifact:
        backend, precision = name.split()
        return replace(some, backend=Backend(backend), precision=Precision(precision))

    def best(*names: str, features: tuple[str, ...] = ("avx2", "avx512f"), cuda: bool = False) -> list[str]:
        monkeypatch.setattr("ditc.runtime.cpu_features.cpu_features", lambda: features)
        for module in ("ditc.runtime.sessions.openvino_library", "ditc.runtime.sessions.onnxruntime"):
            monkeypatch.setattr(f"{module}.cuda_lack", lambda: "" if cuda else "no GPU")
        found, later = in_order(ALL, [denoiser(name) for name in names])
        holds = {name.split()[0] for name in names}
        return [*(name for name in found if name in holds), *later.values()]

    return best


def test_openvino_comes_first_where_it_was_measured_to_be_faster(order) -> None:
    assert order("openvino fp32", "onnxruntime fp32") == [OV, ORT]
    first, second, why = order("openvino fp32", "onnxruntime fp32", features=("avx2",))
    assert (first, second) == (ORT, OV) and "avx512f, which this one is not known to have" in why
    assert order("openvino fp32", "onnxruntime fp32", cuda=True)[0] == ORT


def test_speed_is_no_reason_to_lose_precision(order) -> None:
    assert order("openvino int8", "onnxruntime fp32", "onnxruntime int8") == [ORT, OV]


def test_what_cannot_run_comes_last(order) -> None:
    """ONNX Runtime's CPU provider has no bf16."""
    assert order("openvino bf16", "onnxruntime bf16") == [OV, ORT]
    assert order("openvino bf16", "onnxruntime bf16", features=())[:2] == [OV, ORT]


def test_engines_keep_their_place_whatever_their_precision(order) -> None:
    assert order("tensorrt int8", "openvino fp32", "onnxruntime fp32")[:2] == [TRT, OV]


@pytest.mark.parametrize(("text", "numbers"), [("2026.4.1", (2026, 4)), ("2026.4.0.dev1", (2026, 4))])
def test_versions_are_compared_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert openvino_library._numbers(text) == numbers


def test_the_bundles_record_decides_which_backend_is_faster(tiny_bundle: Path, monkeypatch) -> None:
    some = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    monkeypatch.setattr("ditc.runtime.cpu_features.cpu_features", lambda: ("avx512f",))
    held = [
        replace(some, backend=Backend(backend), precision=Precision(precision))
        for backend, precision in (("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "int8"))
    ]
    names = [name for name in ALL if name in (ORT, OV)]

    def first(**seconds: float) -> tuple[str, dict[Backend, str]]:
        found, later = in_order(names, held, recorded(**seconds))
        return found[0], later

    assert first(openvino_fp32=0.2, onnxruntime_fp32=0.1) == (
        ORT,
        {OV: "a drawing takes it 200 ms, and onnxruntime 100 ms, by the bundle's record of 2026-11-28"},
    )
    assert first(openvino_fp32=0.1, onnxruntime_fp32=0.2)[0] == OV
    assert first(onnxruntime_fp32=0.1) == (OV, {})  # not both were measured: what is known about CPUs decides
    only_int8 = in_order(names, held[1:], recorded(openvino_int8=0.1, onnxruntime_fp32=0.2))
    assert only_int8[0][0] == ORT  # speed is no reason to lose precision


def recorded(**seconds: float) -> BenchEntry:
    def measured(name: str, picture_s: float) -> Measured:
        backend, precision = name.split("_")
        times = Spread(median_s=picture_s, p10_s=picture_s, p90_s=picture_s, repeats=1)
        case = CaseTimes(
            height=64, width=64, batch=1, steps=2, new_prompt=times, cached_prompt=times, stages={}
        )
        return Measured(
            backend=Backend(backend),
            precision=Precision(precision),
            artifact_set="",
            library="1",
            load_s=1.0,
            first_picture_s=1.0,
            peak_bytes=None,
            cases=(case,),
        )

    return BenchEntry(
        machine=this_machine(),
        cpu_features=(),
        threads=1,
        date="2026-11-28T00:00:00+00:00",
        candidates=tuple(measured(name, picture_s) for name, picture_s in seconds.items()),
    )
