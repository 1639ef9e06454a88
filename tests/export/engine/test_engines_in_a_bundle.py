"""`ditc build --backend tensorrt-rtx`, on a CPU: engines are built beside the graphs that ONNX Runtime runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditc.export.build import engine_artifact, preflight
from ditc.export.build.builder import build_bundle
from ditc.export.build.events import BuildEvent
from ditc.export.build.noop import up_to_date
from ditc.export.engine.build import EngineReport
from ditc.export.engine.plugins import has_linear_attention
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BuildError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose
from ditc.runtime.spec import DENOISER, Backend

pytest.importorskip("tensorrt_rtx")
RTX = BuildOptions(backend=Backend.TENSORRT_RTX, targets=("sm86", "sm89"))


@pytest.fixture(scope="module")
def engines(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[BuildEvent]]:
    """A copy of the bundle with engines, and the events of its build."""
    out = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle"))
    events: list[BuildEvent] = []
    build_bundle(tiny_checkpoint, out, RTX, on_event=events.append)
    return out, events


def test_every_stage_gets_an_engine_from_the_graph_that_is_there(
    engines: tuple[Path, list[BuildEvent]], tiny_bundle: Path
) -> None:
    bundle, events = engines
    before, after = load_manifest(tiny_bundle), load_manifest(bundle)
    check_files(bundle, after.all_files())
    for name, stage in after.stages.items():
        graph, engine = stage.artifacts
        assert graph == before.stages[name].artifacts[0]
        assert (engine.backend, engine.targets, engine.spec) == (
            Backend.TENSORRT_RTX,
            ("sm86", "sm89"),
            graph.spec,
        )
        assert engine.library and engine.file.path.startswith("engines/")
    assert {event.status for event in events if not event.stage.endswith("engine")} == {"reused"}


def test_memory_is_estimated_measured_and_recorded(
    engines: tuple[Path, list[BuildEvent]], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, events = engines
    built = [event for event in events if event.status == "built"]
    assert len(built) == len(load_manifest(bundle).stages)
    for event in built:
        assert event.seconds > 0 and event.peak_memory_bytes > 0
        # The fixed part of the estimate assumes a process that has nothing else resident.
        assert event.peak_memory_bytes < 1.5 * event.estimated_memory_bytes
    assert main(["inspect", str(bundle)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tensorrt-rtx 1." in line]
    assert len(lines) == len(built) and all(" s " in line and " GB " in line for line in lines)


def test_the_progress_of_the_builder_is_reported(engines: tuple[Path, list[BuildEvent]]) -> None:
    told = [event for event in engines[1] if event.status == "working" and event.stage == "denoiser engine"]
    assert told and all("/" in event.why for event in told)


def test_a_second_build_does_nothing(engines: tuple[Path, list[BuildEvent]], tiny_checkpoint: Path) -> None:
    report = up_to_date(tiny_checkpoint, engines[0], RTX)
    assert report is not None and {event.status for event in report.events} == {"reused"}
    assert sum(event.stage.endswith("engine") for event in report.events) == 5


def test_other_source_of_the_engines_rebuilds_engines_alone(
    engines: tuple[Path, list[BuildEvent]], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[BuildEvent] = []

    def stop(*_: object, **__: object) -> None:
        raise BuildError("stopped before the first engine")

    monkeypatch.setattr(engine_artifact, "engine_source", lambda: "0" * 64)
    monkeypatch.setattr(engine_artifact, "build_engine", stop)
    with pytest.raises(BuildError, match="stopped"):
        build_bundle(tiny_checkpoint, engines[0], RTX, on_event=events.append)
    assert [event.why for event in events if event.status == "building"] == ["engine source changed"]


def test_the_plugin_rebuilds_the_engines_of_graphs_with_linear_attention_alone(
    engines: tuple[Path, list[BuildEvent]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decoder of the tiny checkpoint is a DC-AE, which has it too."""
    bundle = Path(shutil.copytree(engines[0], tmp_path / "bundle"))
    events: list[BuildEvent] = []

    def compile_nothing(onnx: Path, out: Path, **given: Any) -> EngineReport:
        out.write_bytes(onnx.name.encode())
        return EngineReport(
            file=out,
            size_bytes=0,
            seconds=0.0,
            peak_memory_bytes=0,
            targets=given["targets"],
            profiles=given["profiles"],
            library="",
            version="",
            num_layers=0,
            types=(),
            tf32=False,
            warnings=(),
        )

    monkeypatch.setattr(preflight, "load_kernels", lambda: None)  # they are not compiled here
    monkeypatch.setattr(engine_artifact, "build_engine", compile_nothing)
    build_bundle(tiny_checkpoint, bundle, replace(RTX, linear_attention="plugin"), on_event=events.append)
    built = {event.stage: event.why for event in events if event.status == "building"}
    with_op = {
        name
        for name, stage in load_manifest(bundle).stages.items()
        if has_linear_attention(bundle / stage.artifacts[0].file.path)
    }
    assert DENOISER in with_op and with_op < set(load_manifest(bundle).stages)
    assert built == {f"{name} engine": "linear attention changed" for name in with_op}


def test_other_targets_rebuild_engines_alone_and_a_failure_keeps_the_bundle(
    engines: tuple[Path, list[BuildEvent]],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, _ = engines
    before = load_manifest(bundle)
    events: list[BuildEvent] = []

    def fail(*_: object, **__: object) -> None:
        raise BuildError("denoiser: the library's words", hint="its hint")

    monkeypatch.setattr(engine_artifact, "build_engine", fail)
    with pytest.raises(BuildError, match="the library's words"):
        build_bundle(
            tiny_checkpoint,
            bundle,
            BuildOptions(backend=Backend.TENSORRT_RTX, targets=("sm120",)),
            on_event=events.append,
        )
    assert [event.why for event in events if event.status == "building"] == ["targets changed"]
    assert load_manifest(bundle) == before
    check_files(bundle, before.all_files())


def test_a_machine_without_gpu_still_takes_the_graphs(engines: tuple[Path, list[BuildEvent]]) -> None:
    chosen, _ = choose(load_manifest(engines[0]), LoadOptions(backend="onnxruntime"))
    assert {artifact.backend for artifact in chosen.values()} == {Backend.ONNXRUNTIME}
