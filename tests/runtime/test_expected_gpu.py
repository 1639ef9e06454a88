"""The CPU that draws where a GPU was expected is a warning that says why; with --device it is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ditc.runtime import expected_gpu, gpu
from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.cuda_driver import CudaAnswer, CudaGpu
from ditc.runtime.errors import UsageError
from ditc.runtime.expected_gpu import check_cpu_is_meant
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.sessions import opening
from ditc.runtime.spec import DENOISER, Backend

FIRST = CudaGpu(name="NVIDIA RTX 5090", sm="sm120", uuid="GPU-aa", memory_bytes=1)
SECOND = CudaGpu(name="NVIDIA L40", sm="sm89", uuid="GPU-bb", memory_bytes=1)
CPU_IS_NAMED = LoadOptions(provider="cpu")


@pytest.fixture
def with_engine(tiny_bundle: Path) -> Manifest:
    """A bundle with an engine for the L40."""
    manifest = load_manifest(tiny_bundle)
    stage = manifest.stages[DENOISER]
    changes = {"backend": Backend.TENSORRT_RTX, "targets": ("sm89",), "library": "1.7.1"}
    engine = replace(stage.artifacts[0], **changes)
    return replace(manifest, stages={DENOISER: replace(stage, artifacts=(*stage.artifacts, engine))})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(*found: CudaGpu) -> None:
        monkeypatch.setattr(gpu, "cuda", lambda: CudaAnswer(gpus=found, lack="" if found else "none at all"))
        monkeypatch.setattr(opening, "library_version", lambda backend: "1.7.1")
        monkeypatch.setattr(expected_gpu, "library_version", lambda backend: "1.7.1")
        monkeypatch.setattr(expected_gpu, "check_runs", lambda artifact: None)

    return have


def test_an_engine_for_another_gpu_of_this_machine_is_named_with_its_number(
    with_engine: Manifest, gpus: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gpus(FIRST, SECOND)
    check_cpu_is_meant(with_engine, LoadOptions())
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "although this machine has NVIDIA RTX 5090" in record.message
    assert "the engine is for sm89" in record.message and "it fits NVIDIA L40: --device 1" in record.message


def test_engines_without_any_gpu_are_a_warning_too_where_one_may_be(
    with_engine: Manifest,
    gpus: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus()
    monkeypatch.setattr(expected_gpu, "may_have_gpu", lambda: True)
    check_cpu_is_meant(with_engine, LoadOptions())
    assert "although the bundle has engines; denoiser: this machine has no NVIDIA GPU" in caplog.text
    caplog.clear()
    monkeypatch.setattr(expected_gpu, "may_have_gpu", lambda: False)
    with caplog.at_level(logging.INFO):
        check_cpu_is_meant(with_engine, LoadOptions())
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_gpu_without_a_driver_is_seen_on_the_pci_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    for number, vendor in enumerate(("0x8086", "0x1af4", "0x10de")):
        assert not gpu.may_have_gpu()
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
    assert gpu.may_have_gpu()
    monkeypatch.setattr(gpu, "PCI", tmp_path / "not here")
    assert gpu.may_have_gpu()


def test_the_cpu_is_no_surprise_where_it_is_named_or_all_that_there_is(
    tiny_bundle: Path, with_engine: Manifest, gpus: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gpus(FIRST, SECOND)
    check_cpu_is_meant(with_engine, CPU_IS_NAMED)
    gpus()
    check_cpu_is_meant(load_manifest(tiny_bundle), LoadOptions())
    assert not caplog.records


def test_a_gpu_that_is_named_and_not_used_is_an_error(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditc.runtime import loader

    monkeypatch.setattr(loader, "select_gpu", lambda device: None)
    with pytest.raises(UsageError, match="GPU 0 is named, but the denoiser would run on the CPU"):
        Pipeline.load(tiny_bundle, device="0", threads=1)


def test_a_machine_without_a_gpu_refuses_device(tiny_bundle: Path, gpus: Callable[..., None]) -> None:
    from ditc.runtime.gpu import cuda

    if cuda().gpus:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="there is no GPU 0 here: "):
        Pipeline.load(tiny_bundle, device="0")
