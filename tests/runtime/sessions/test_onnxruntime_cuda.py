"""A CUDA provider that ONNX Runtime lists but cannot load, imitated with the CPU's wheel, which lacks its library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.commands import doctor_engines
from ditc.runtime.errors import SessionError
from ditc.runtime.gpu import Gpu
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions import onnxruntime_cuda
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, where ONNX Runtime lists the CUDA provider and cannot load its library."""
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so"))  # noqa: T201
    monkeypatch.setattr(onnxruntime_cuda, "find_gpu", lambda: Gpu("a GPU", "sm90"))
    onnxruntime_cuda.cuda_lack.cache_clear()
    yield
    onnxruntime_cuda.cuda_lack.cache_clear()


@pytest.mark.usefixtures("broken_cuda")
def test_a_cuda_provider_that_does_not_load_is_named_and_auto_takes_the_cpu(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime alone continues with a CPU session, whose first run fails because it cannot bind to the device."""
    with Pipeline.load(tiny_bundle) as pipe:
        pipe.draw(Request(prompt="red cat", num_inference_steps=2, height=64, width=64, seed=1))
    said = [record.message for record in caplog.records if "CUDA provider does not load" in record.message]
    assert len(said) == 1 and "libonnxruntime_providers_cuda.so: cannot open" in said[0]
    assert capsys.readouterr().out == ""
    with pytest.raises(SessionError, match="text_encoder: ONNX Runtime's CUDA provider does not load") as e:
        Pipeline.load(tiny_bundle, provider="cuda")
    assert "onnxruntime-gpu[cuda,cudnn]" in str(e.value.hint)


@pytest.mark.usefixtures("broken_cuda")
def test_doctor_says_why_the_cuda_provider_does_not_run() -> None:
    (finding,) = doctor_engines._onnxruntime(Gpu("a GPU", "sm90"))
    assert (
        finding.topic == "cannot run"
        and "does not load" in finding.text
        and finding.hint == onnxruntime_cuda.INSTALL
    )


def test_a_session_without_its_provider_is_refused(tiny_bundle: Path) -> None:
    """ONNX Runtime itself only warns that it continues without the provider."""
    artifact = load_manifest(tiny_bundle).stages["conditioner"].artifacts[0]
    with pytest.warns(UserWarning), pytest.raises(SessionError, match="without CUDAExecutionProvider"):
        OnnxRuntimeSession(tiny_bundle / artifact.file.path, artifact.spec, provider="CUDAExecutionProvider")
