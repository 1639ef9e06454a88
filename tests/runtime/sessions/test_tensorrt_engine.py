"""What TensorRT says about engines on a machine without a GPU, and the cache of compiled kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ditc.export.engine.tensorrt import Compiler
from ditc.runtime import loader
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import DitcError, SessionError
from ditc.runtime.gpu import Gpu, find_gpu
from ditc.runtime.loader import choose
from ditc.runtime.sessions import opening
from ditc.runtime.sessions.device import open_device
from ditc.runtime.sessions.kernel_cache import cache_folder, kernel_cache
from ditc.runtime.sessions.registry import missing
from ditc.runtime.sessions.tensorrt_engine import TensorRTEngine, validity
from ditc.runtime.sessions.tensorrt_log import HARMLESS, MAX_MESSAGES, message_log
from ditc.runtime.spec import Backend

STREAM = 7
KEY = {"gpu": "NVIDIA L40", "driver": "580.1", "library": "1.7.1", "engine": "abc"}


def test_kernels_are_kept_by_gpu_driver_library_and_engine(tmp_path: Path) -> None:
    cache = kernel_cache(tmp_path, **KEY)
    assert cache.load() == b""
    cache.save(b"kernels")
    assert kernel_cache(tmp_path, **KEY).load() == b"kernels"
    for name in KEY:
        assert kernel_cache(tmp_path, **{**KEY, name: "other"}).load() == b""
    cache.discard()
    assert cache.load() == b"" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b""]
)
def test_damaged_kernels_are_not_loaded(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """TensorRT-RTX 1.7.1 accepts some damaged kernels, and then cannot make a context."""
    cache = kernel_cache(tmp_path, **KEY)
    cache.save(b"kernels" * 10)
    cache.file.write_bytes(damage(cache.file.read_bytes()))
    assert cache.load() == b""
    cache.save(b"kernels" * 10)
    assert cache.load() == b"kernels" * 10


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kernel_cache(tmp_path / "file", **KEY).save(b"kernels")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_user_without_a_home_folder_has_no_kernel_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None


def test_the_reasons_against_an_engine_are_named() -> None:
    """The enums are the library's own, and its answer is replaced: 2 is UNSUPPORTED_CC, 4 is OLD_CUDA_DRIVER."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    says: Any = SimpleNamespace(get_engine_validity=lambda header: (trt.EngineValidity.INVALID, 2 | 4))
    valid, reasons = validity(trt, says, b"")
    assert not valid and sorted(reasons) == ["OLD_CUDA_DRIVER", "UNSUPPORTED_CC"]
    says = SimpleNamespace(get_engine_validity=lambda header: (trt.EngineValidity.SUBOPTIMAL, 0))
    assert validity(trt, says, b"") == (True, [])
    assert validity(trt, SimpleNamespace(), b"") == (True, [])  # TensorRT has no such question


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_a_file_that_is_not_an_engine_is_refused_by_the_library_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = tmp_path / "denoiser.engine"
    path.write_bytes(bytes(1024))
    with pytest.raises(
        SessionError, match=r"denoiser: tensorrt-rtx .* refuses the engine on a machine without a GPU"
    ):
        TensorRTEngine(path, Backend.TENSORRT_RTX, stage="denoiser", gpu=None)


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_device_says_what_is_missing() -> None:
    """Either cuda-python is not installed, or it finds no driver."""
    with pytest.raises(DitcError, match=r"cuda-python is not installed|cudaError 35|cudaError 100"):
        open_device()


def test_auto_skips_an_engine_for_another_gpu(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    manifest = load_manifest(tiny_bundle)
    stages = {}
    for name, stage in manifest.stages.items():
        engine = replace(
            stage.artifacts[0],
            backend=Backend.TENSORRT_RTX,
            targets=("sm89",),
            library="1.7.1",
            key=f"engine-{name}",
        )
        stages[name] = replace(stage, artifacts=(*stage.artifacts, engine))
    manifest = replace(manifest, stages=stages)
    runnable = {Backend.TENSORRT_RTX: "a GPU", Backend.ONNXRUNTIME: "installed"}
    monkeypatch.setattr(loader, "available_backends", lambda: runnable)
    monkeypatch.setattr(opening, "library_version", lambda backend: "1.7.1")
    monkeypatch.setattr(opening, "find_gpu", lambda: Gpu("NVIDIA L40", "sm89"))
    chosen, reason = choose(manifest)
    assert {a.backend for a in chosen.values()} == {Backend.TENSORRT_RTX} and "a GPU" in reason
    monkeypatch.setattr(opening, "find_gpu", lambda: Gpu("NVIDIA RTX 5090", "sm120"))
    chosen, _ = choose(manifest)
    assert {a.backend for a in chosen.values()} == {Backend.ONNXRUNTIME}


def test_a_profile_is_chosen_in_the_stream_that_runs_the_engine(library: Library, tmp_path: Path) -> None:
    assert _engine(tmp_path).context(1, STREAM).enqueue(STREAM)
    streams = [c[-1] for c in library.calls if c[0] in ("set_optimization_profile_async", "execute_async_v3")]
    assert streams == [STREAM, STREAM]


def test_a_profile_that_the_library_refuses_is_an_error(library: Library, tmp_path: Path) -> None:
    library.refused = "set_optimization_profile_async"
    with pytest.raises(SessionError, match="denoiser: profile 1 is refused"):
        _engine(tmp_path).context(1, STREAM)


def test_an_engine_of_tensorrt_leaves_the_plugins_name_to_the_one_that_builds(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's registry takes one plugin per name, and a build in the same process registers its QDP under it."""
    other = ModuleType("tensorrt")
    other.__dict__.update(vars(importlib.import_module("tensorrt_rtx")), __name__="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", other)
    monkeypatch.setattr(other, "get_plugin_registry", lambda: pytest.fail("something is registered"))
    _engine(tmp_path, Backend.TENSORRT)


def test_builders_and_runtimes_share_one_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library warns about a second logger, ignores it, and keeps its pointer to the first, even a freed one."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    builders = [Compiler(Backend.TENSORRT_RTX), Compiler(Backend.TENSORRT_RTX)]
    with pytest.raises(SessionError, match="refuses the engine"):
        _engine(tmp_path)
    said = [*caplog.messages, *(text for builder in builders for text in builder.warnings())]
    assert not [text for text in said if "differs from one already registered" in text]


def test_the_last_error_of_an_engine_is_no_older_than_the_engine(library: Library, tmp_path: Path) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    logger = message_log(trt).logger
    logger.log(trt.ILogger.ERROR, "of a build before")
    engine = _engine(tmp_path)
    assert engine.last_error() == "no message"
    for number in range(2 * MAX_MESSAGES):
        logger.log(trt.ILogger.ERROR, f"error {number}\nmore of it")
    logger.log(trt.ILogger.INFO, "and something else")
    assert engine.last_error() == f"error {2 * MAX_MESSAGES - 1}"
    assert len(message_log(trt).since(0)) == MAX_MESSAGES


def test_a_warning_that_does_not_apply_is_not_passed_on(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    _engine(tmp_path)
    for text in (f"{HARMLESS} will increase peak CPU memory", "a kernel is slow"):
        message_log(trt).logger.log(trt.ILogger.WARNING, text)
    assert caplog.messages == ["a kernel is slow"]


def test_an_address_that_the_library_refuses_is_an_error(library: Library, tmp_path: Path) -> None:
    library.refused = "set_tensor_address"
    with pytest.raises(SessionError, match="the engine refuses 0x100 as the address of latents"):
        _engine(tmp_path).context(0, STREAM).set_address("latents", 0x100)


def test_weights_are_exchanged_in_their_own_type(
    library: Library, refitter: Refitter, tmp_path: Path
) -> None:
    given = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, np.float16),
        "c": np.ones(5, np.uint16),
    }
    _engine(tmp_path).refit(given)
    assert refitter.given == {"a": ("FLOAT", 6), "b": ("HALF", 4), "c": ("BF16", 5)}
    assert refitter.done


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"unknown": "a"}, "does not take a with 6 FLOAT values"),
        ({"missing": ["d"]}, "needs values of d too"),
        ({"fails": True}, "exchange of weights fails"),
    ],
)
def test_an_exchange_that_the_library_refuses_is_an_error(
    wrong: dict[str, Any], words: str, library: Library, refitter: Refitter, tmp_path: Path
) -> None:
    vars(refitter).update(wrong)
    with pytest.raises(SessionError, match=words) as caught:
        _engine(tmp_path).refit({"a": np.zeros((2, 3), np.float32)})
    assert "--lora" in str(caught.value.hint)
    assert not refitter.done


def test_a_cache_of_kernels_that_the_library_refuses_is_reported(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library.refused = "set_runtime_cache"
    _engine(tmp_path, kernels=kernel_cache(tmp_path, **KEY)).context(0, STREAM)
    assert "denoiser: the library does not use the cache of compiled kernels" in caplog.text


def test_a_context_gets_the_kernels_of_those_before_it(library: Library, tmp_path: Path) -> None:
    """The library shares kernels only after they were serialised. Without that, every new loop compiles them again."""
    library.__dict__["serialize"] = lambda: library.calls.append(("serialize",)) or b"kernels"
    engine = _engine(tmp_path, kernels=kernel_cache(tmp_path, **KEY))
    for _ in range(2):
        engine.context(0, STREAM)
    # They are on disk already, so a process that is killed leaves them for the next one.
    assert kernel_cache(tmp_path, **KEY).load() == b"kernels"
    names = [call[0] for call in library.calls if call[0] in ("serialize", "create_execution_context")]
    assert names == ["create_execution_context", "serialize", "create_execution_context"]


def test_only_the_first_start_says_that_it_compiles_kernels(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = kernel_cache(tmp_path, **KEY)
    for messages in (["denoiser: compiling its kernels for this GPU; they are kept for the next start"], []):
        engine = _engine(tmp_path, kernels=kernels)
        for _ in range(2):
            engine.context(0, STREAM)
        assert caplog.messages == messages
        caplog.clear()
        kernels.save(b"kernels")


@pytest.mark.parametrize(("says", "needs"), [(123, 123), (0, 456)])
def test_the_workspace_is_what_the_library_says_for_the_shapes(
    says: int, needs: int, library: Library, tmp_path: Path
) -> None:
    """0 means that the library cannot say. Then the workspace is as large as the profile needs."""
    library.__dict__["update_device_memory_size_for_shapes"] = lambda: says
    library.__dict__["get_device_memory_size_for_profile_v2"] = lambda profile: 456
    assert _engine(tmp_path).context(0, STREAM).workspace_bytes() == needs


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("INSUFFICIENT_GPU_MEMORY", "--low-vram"),
        ("OLD_CUDA_DRIVER", "driver"),
        ("UNSUPPORTED_CC", "ditc build"),
    ],
)
def test_the_error_of_a_refused_engine_has_a_hint(
    reason: str, hint: str, library: Library, tmp_path: Path
) -> None:
    trt = importlib.import_module("tensorrt_rtx")
    flag = int(getattr(trt.EngineInvalidityDiagnostics, reason))
    library.__dict__["get_engine_validity"] = lambda header: (trt.EngineValidity.INVALID, flag)
    with pytest.raises(SessionError, match=reason) as caught:
        _engine(tmp_path)
    assert hint in str(caught.value.hint)


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("backend", [Backend.TENSORRT, Backend.TENSORRT_RTX])
def test_what_a_backend_lacks_is_one_sentence(backend: Backend) -> None:
    assert "pip install" in missing(backend) or "no NVIDIA GPU" in missing(backend)


class Library:
    """Stands for a runtime, an engine, its contexts and their configs. It records all calls; only `refused` fails."""

    engine_header_size = 64
    refused = ""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        return importlib.import_module("tensorrt_rtx").EngineValidity.VALID, 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self if name.startswith(("create_", "deserialize_cuda_engine")) else name != self.refused

        return call


class Refitter:
    """Stands for the library's Refitter. The values that it gets are the library's own Weights."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[str, int]] = {}
        self.unknown, self.missing, self.fails, self.done = "", [], False, False

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.given[name] = (weights.dtype.name, weights.size)
        return name != self.unknown

    def get_missing_weights(self) -> list[str]:
        return self.missing

    def refit_cuda_engine(self) -> bool:
        self.done = not self.fails
        return self.done


@pytest.fixture
def refitter(monkeypatch: pytest.MonkeyPatch) -> Refitter:
    """A Refitter in place of TensorRT-RTX's."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    refitter = Refitter()
    monkeypatch.setattr(trt, "Refitter", lambda engine, logger: refitter)
    return refitter


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """A Library in place of TensorRT-RTX's runtime. The rest of tensorrt_rtx is the real one."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    library = Library()
    monkeypatch.setattr(trt, "Runtime", lambda logger: library)
    return library


def _engine(folder: Path, backend: Backend = Backend.TENSORRT_RTX, **options: Any) -> TensorRTEngine:
    path = folder / "denoiser.engine"
    path.write_bytes(bytes(64))
    return TensorRTEngine(path, backend, stage="denoiser", gpu=None, **options)
