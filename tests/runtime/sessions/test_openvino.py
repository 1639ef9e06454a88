"""OpenVINO as a backend: its pictures are ONNX Runtime's, for any shapes, from any thread; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import need_openvino

from ditc.runtime.bundle.manifest import Artifact, load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError, DitcError, SessionError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice
from ditc.runtime.sessions import openvino, openvino_library
from ditc.runtime.sessions.compiled_shapes import CompiledShapes
from ditc.runtime.sessions.onnxruntime import OnnxRuntimeSession
from ditc.runtime.sessions.opening import open_session
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import DENOISER, VAE_DECODER, VAE_ENCODER, Backend

SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
# Both libraries compute in fp32 but sum in another order: 1e-7 to 5e-7 per stage (ditc verify --run). A wrong kernel or
# a stage in bf16 is off by 1e-2.
SAME_PICTURE = 1e-4


@pytest.fixture(scope="module")
def ours(openvino_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(openvino_bundle, backend="openvino", threads=1) as pipeline:
        yield pipeline


def artifact_of(bundle: Path, stage: str) -> Artifact:
    artifacts = load_manifest(bundle).stages[stage].artifacts
    return next(a for a in artifacts if a.backend is Backend.OPENVINO)


def requests(count: int) -> list[Request]:
    sizes = ((64, 64), (64, 96), (96, 64))
    return [
        Request(
            prompt=prompt,
            seed=i,
            guidance_scale=1.0 if i % 4 == 3 else 3.0,
            **SMALL | {"height": h, "width": w},
        )
        for i, prompt in zip(range(count), ["red cat", "blue dog"] * count, strict=False)
        for h, w in [sizes[i % 3]]
    ]


def test_pictures_equal_those_of_onnx_runtime(ours: Pipeline, openvino_bundle: Path) -> None:
    with Pipeline.load(openvino_bundle, backend="onnxruntime", threads=1) as theirs:
        for request in requests(3):
            difference = np.abs(ours.draw(request).images - theirs.draw(request).images).max()
            assert difference <= SAME_PICTURE
    opened = {session.device.name for name, session in ours.sessions.items() if name != VAE_ENCODER}
    assert opened == {"OpenVINO on the CPU"}


def test_threads_draw_what_each_draws_alone(ours: Pipeline) -> None:
    alone = [ours.draw(request).images for request in requests(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda request: ours.draw(request).images, requests(8)))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(np.array_equal, together, alone))


def test_results_belong_to_the_caller_and_inputs_are_only_read(ours: Pipeline) -> None:
    session = ours.sessions[VAE_DECODER]
    first = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
    first.flags.writeable = False
    kept, result = first.copy(), session.run({"latents": first})["image"]
    before = np.array(result)
    session.run({"latents": -first[:, :, ::-1]})  # not contiguous, so it is copied first
    assert np.array_equal(result, before) and np.array_equal(first, kept)


def test_results_are_written_where_they_stay(openvino_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a whole video, or of a picture of 4K, would take hundreds of megabytes."""
    artifact = artifact_of(openvino_bundle, VAE_DECODER)
    session = OpenvinoSession(openvino_bundle / artifact.file.path, artifact.spec, threads=1)
    copies: list[object] = []
    copied = openvino._copied
    monkeypatch.setattr(openvino, "_copied", lambda *given: copies.append(given) or copied(*given))
    feeds = [{"latents": np.full((1, 8, 16, 16), value, np.float32)} for value in (0.5, -0.5)]
    first = session.run(feeds[0])["image"]
    before = np.array(first)
    assert not np.array_equal(np.asarray(session.run(feeds[1])["image"]), before)
    np.testing.assert_array_equal(np.asarray(first), before)
    assert not copies
    # The form for all shapes does not know the shape of its result before the run.
    session._compiled = CompiledShapes(session._compile, most=1)
    for _ in range(2):  # a form that ran only once would give way
        session.run({"latents": np.zeros((1, 8, 16, 17), np.float32)})
    np.testing.assert_allclose(np.asarray(session.run(feeds[0])["image"]), before, rtol=0, atol=SAME_PICTURE)
    assert len(copies) == 1
    session.close()


def test_shapes_beyond_the_bound_are_drawn_by_a_dynamic_model(openvino_bundle: Path, ours: Pipeline) -> None:
    artifact = artifact_of(openvino_bundle, VAE_DECODER)
    session = open_session(openvino_bundle / artifact.file.path, artifact, LoadOptions(threads=1))
    session._compiled = CompiledShapes(session._compile, most=1)  # type: ignore[attr-defined]
    for width in (16, 16, 17, 18, 16):
        latents = np.ones((1, 8, 16, width), np.float32)
        expected = ours.sessions[VAE_DECODER].run({"latents": latents})["image"]
        np.testing.assert_allclose(session.run({"latents": latents})["image"], expected, atol=SAME_PICTURE)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="vae_decoder: the session is closed"):
        session.run({"latents": latents})


@pytest.mark.parametrize("stage", [DENOISER, VAE_DECODER])
def test_a_stage_is_compiled_while_texts_are_encoded(
    openvino_bundle: Path, ours: Pipeline, stage: str
) -> None:
    artifact = artifact_of(openvino_bundle, stage)
    for threads, expected in ((2, [f"compile {stage}"]), (1, ["MainThread"])):
        session = OpenvinoSession(openvino_bundle / artifact.file.path, artifact.spec, threads=threads)
        compiling: list[str] = []
        compile_it = session._compile

        def noted(shapes: Any, names: list[str] = compiling, compile_it: Any = compile_it) -> Any:
            names.append(threading.current_thread().name)
            return compile_it(shapes)

        session._compiled = CompiledShapes(noted, most=2)
        pipeline = ours.with_sessions({stage: session}, owned=True)
        (request,) = requests(1)
        difference = np.abs(pipeline.draw(request).images - ours.draw(request).images).max()
        assert difference <= SAME_PICTURE
        pipeline.draw(request)
        assert compiling == expected  # once in all
        other = replace(request, height=96, max_sequence_length=5)
        pipeline.draw(other)
        assert [name != "MainThread" for name in compiling[1:]] == [threads > 1 and stage == VAE_DECODER], (
            "another length of the text is not known before"
        )
        plan = pipeline.plan(replace(request, width=96))
        pipeline.close()
        pipeline.compile_ahead(plan)  # nothing to do, and no error


def test_shapes_and_types_that_do_not_fit_are_refused_before_anything_is_compiled(ours: Pipeline) -> None:
    run = ours.sessions[VAE_DECODER].run
    for latents, message in (
        (np.zeros((1, 8, 16, 999), np.float32), r"width of latents is 999, but the stage takes \d+ to \d+"),
        (np.zeros((1, 7, 16, 16), np.float32), r"latents is \(1, 7, 16, 16\)"),
        (np.zeros((1, 8, 16, 16), np.float64), "latents is float64"),
    ):
        with pytest.raises(SessionError, match=message):
            run({"latents": latents})


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "OpenVINO is not installed"), ("2024.6.0", "OpenVINO 2024.6.0 is too old"), ("2026.4.1", "")],
)
def test_a_missing_or_old_package_is_named_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, version: str | None, message: str, tiny_bundle: Path
) -> None:
    monkeypatch.setattr(openvino_library, "library_version", lambda backend: version)
    lack = row_of("openvino").lack(row_of("openvino"))
    assert lack.startswith(message) and ('pip install "ditc[openvino]"' in lack) is bool(message)


def test_a_bundle_without_openvinos_files_says_what_to_build(tiny_bundle: Path) -> None:
    with pytest.raises(DitcError, match="requested: openvino") as caught:
        Pipeline.load(tiny_bundle, backend="openvino")
    assert str(caught.value.hint).endswith("ditc build CHECKPOINT -o BUNDLE --backend openvino")


@pytest.mark.parametrize(("found", "hint"), [(["CPU"], "on the CPU"), ([], "pip install")])
def test_a_device_that_is_not_there_is_refused(
    openvino_bundle: Path, monkeypatch: pytest.MonkeyPatch, found: list[str], hint: str
) -> None:
    class Core:
        available_devices = found

    monkeypatch.setattr("ditc.runtime.sessions.openvino.core", Core)
    device = "GPU" if found else "CPU"
    with pytest.raises(SessionError, match=f"text_encoder: OpenVINO finds no {device}") as caught:
        Pipeline.load(openvino_bundle, device=device)
    assert hint in str(caught.value.hint)


def test_files_that_changed_after_the_build_are_refused(openvino_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(openvino_bundle, tmp_path / "bundle"))
    for ref in artifact_of(bundle, DENOISER).files[:2]:
        path = bundle / ref.path
        original = path.read_bytes()
        path.write_bytes(original[:-8] + bytes(8))
        with pytest.raises(BundleError, match=path.name):
            Pipeline.load(bundle, backend="openvino")
        path.write_bytes(original)


def test_a_file_that_openvino_cannot_read_is_one_line(openvino_bundle: Path, tmp_path: Path) -> None:
    artifact = artifact_of(openvino_bundle, VAE_DECODER)
    path = tmp_path / "engines" / "broken.xml"
    path.parent.mkdir()
    path.write_text('<?xml version="1.0"?><net name="x" version="99"><layers></layers></net>')
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(SessionError, match=r"vae_decoder: OpenVINO .* cannot read broken\.xml: \S") as caught:
        open_session(path, artifact, LoadOptions())
    assert "\n" not in str(caught.value)


def test_verbs_work_with_it_and_auto_says_why_it_was_not_taken(
    openvino_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = str(shutil.copytree(openvino_bundle, tmp_path / "bundle"))
    assert main(["verify", bundle, "--run", "--backend", "openvino"]) == 0
    assert main(["inspect", bundle]) == 0
    assert "openvino 2026" in capsys.readouterr().out
    monkeypatch.setattr("ditc.runtime.cpu_features.cpu_features", lambda: ("avx2",))
    caplog.set_level("INFO", logger="ditc")
    Pipeline.load(bundle, threads=1).close()
    assert "onnxruntime fp32: ONNX Runtime is installed; not openvino: OpenVINO was measured" in caplog.text


# Imports OpenVINO as ditc does, and prints the number of sockets and of threads that could report it.
QUIET = """
import json, os, sys
import ditc.runtime
from ditc.runtime.sessions.openvino_library import core
devices = core().available_devices
fds = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
print(json.dumps([devices, sum(f.startswith("socket:") for f in fds), "openvino_telemetry" in sys.modules]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sockets are counted in Linux's /proc")
def test_the_import_is_not_reported(tmp_path: Path) -> None:
    """By default `import openvino` reports itself to Google Analytics and leaves an id in ~/intel."""
    need_openvino()
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    devices, sockets, reports = json.loads(done.stdout)
    assert "CPU" in devices and sockets == 0 and not reports
    assert list(tmp_path.iterdir()) == []


def test_parity_does_not_take_a_wider_type_for_16_bits(
    openvino_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without bf16 products, OpenVINO computes bf16 in fp32: the rounding is then written into the graph."""
    from ditc.parity import candidate

    rounded: list[str] = []

    def open_rounded(model: Path, artifact: Artifact, *, threads: int) -> tuple[Any, None]:
        rounded.append(model.suffix)
        return OnnxRuntimeSession(model, artifact.spec, threads=threads), None

    monkeypatch.setattr(ComputeDevice, "widens", lambda device, precision: device.name.startswith("OpenVINO"))
    monkeypatch.setattr(candidate, "open_rounded", open_rounded)
    found = candidate.open_candidate(openvino_bundle, LoadOptions(backend="openvino", threads=1))
    assert rounded == [".onnx"] * 5 and found.native.keys() == found.sessions.keys()
    found.pipeline.close()
