"""Checkpoints and bundles that many tests share. The first process that needs one makes it, once per run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

import ditc.runtime  # noqa: F401  # turns telemetry off, before tests import the libraries that read that setting

if TYPE_CHECKING:
    from ditc.export.build.builder import BuildReport

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import tiny_sana and other helpers

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when a test imports it

ROOT = Path(__file__).parents[1]
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"


Make = Callable[[Path], object]


@pytest.fixture(autouse=True)
def unchanged_log_level() -> None:
    """Undo the level that the command line sets for ditc's log when an earlier test of this process has called it."""
    logging.getLogger("ditc").setLevel(logging.NOTSET)


def need_openvino() -> None:
    """Skip a test where OpenVINO is not installed. pytest.importorskip would import it, which reports the import."""
    if find_spec("openvino") is None:
        pytest.skip("needs the extra: pip install ditc[openvino]")


def made_once(factory: pytest.TempPathFactory, name: str, make: Make) -> Path:
    """The directory that `make` writes. Processes of pytest-xdist share it: all others wait for the first one."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    path, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # left by a process that failed
            make(path)
            done.touch()
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Sana checkpoint with two layers in diffusers layout."""
    from tiny_sana import make_checkpoint

    return made_once(tmp_path_factory, "tiny-checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def pag_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Sana checkpoint whose model_index.json names SanaPAGPipeline, with perturbed attention in block 1."""
    from tiny_sana import make_pag_checkpoint

    return made_once(tmp_path_factory, "pag-checkpoint", make_pag_checkpoint)


@pytest.fixture(scope="session")
def pag_bundle(pag_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of pag_checkpoint: fp32, ONNX Runtime. Tests that change files copy it first."""
    return made_once(tmp_path_factory, "pag-bundle", lambda path: _build(pag_checkpoint, path))


@pytest.fixture(scope="session")
def sprint_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded SANA-Sprint checkpoint with two layers."""
    from tiny_sana import make_sprint_checkpoint

    return made_once(tmp_path_factory, "sprint-checkpoint", make_sprint_checkpoint)


@pytest.fixture(scope="session")
def sprint_bundle(sprint_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of sprint_checkpoint: fp32, ONNX Runtime. Tests that change files copy it first."""
    return made_once(tmp_path_factory, "sprint-bundle", lambda path: _build(sprint_checkpoint, path))


@pytest.fixture(scope="session")
def control_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Sana transformer of three layers with a ControlNet of two. All else is tiny_checkpoint's."""
    from tiny_sana import make_control_checkpoint

    return made_once(
        tmp_path_factory, "control-checkpoint", lambda path: make_control_checkpoint(tiny_checkpoint, path)
    )


@pytest.fixture(scope="session")
def control_bundle(
    control_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built over a copy of tiny_bundle, whose text encoder and VAE are reused."""

    def make(path: Path) -> BuildReport:
        return _build(control_checkpoint, Path(shutil.copytree(tiny_bundle, path)))

    return made_once(tmp_path_factory, "control-bundle", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of tiny_checkpoint: fp32, ONNX Runtime. Tests that change files copy it first."""
    return made_once(tmp_path_factory, "tiny-bundle", lambda path: _build(tiny_checkpoint, path))


@pytest.fixture(scope="session")
def lora_inputs_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """tiny_bundle for ONNX Runtime and OpenVINO, whose conditioner and denoiser take LoRAs as inputs."""
    need_openvino()

    def make(path: Path) -> None:
        from ditc.export.build.builder import build_bundle
        from ditc.export.contract import BuildOptions
        from ditc.runtime.spec import Backend

        shutil.copytree(tiny_bundle, path)
        build_bundle(tiny_checkpoint, path, BuildOptions(lora_inputs=True, backend=Backend.OPENVINO))

    return made_once(tmp_path_factory, "lora-inputs-bundle", make)


@pytest.fixture(scope="session")
def video_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded SANA-Video checkpoint with two layers."""
    from tiny_sana_video import make_checkpoint

    return made_once(tmp_path_factory, "video-checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def video_bundle(video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of video_checkpoint: fp32, ONNX Runtime. Tests that change files copy it first."""
    return made_once(tmp_path_factory, "video-bundle", lambda path: _build(video_checkpoint, path))


@pytest.fixture(scope="session")
def whole_video_checkpoint(video_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """video_checkpoint with LTX-2's kind of autoencoder, which decodes a video as a whole."""
    from tiny_sana_video import make_ltx2_checkpoint

    return made_once(
        tmp_path_factory,
        "whole-video-checkpoint",
        lambda path: make_ltx2_checkpoint(path, video_checkpoint),
    )


@pytest.fixture(scope="session")
def whole_video_bundle(
    whole_video_checkpoint: Path, video_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built over a copy of video_bundle, whose text encoder and denoiser are reused."""

    def make(path: Path) -> BuildReport:
        return _build(whole_video_checkpoint, Path(shutil.copytree(video_bundle, path)))

    return made_once(tmp_path_factory, "whole-video-bundle", make)


@pytest.fixture(scope="session")
def openvino_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """tiny_bundle with OpenVINO's form of every graph. Tests that change files copy it first."""
    need_openvino()

    def make(path: Path) -> None:
        from ditc.export.build.builder import build_bundle
        from ditc.export.contract import BuildOptions
        from ditc.runtime.spec import Backend

        shutil.copytree(tiny_bundle, path)
        build_bundle(tiny_checkpoint, path, BuildOptions(backend=Backend.OPENVINO))

    return made_once(tmp_path_factory, "openvino-bundle", make)


@pytest.fixture(scope="session")
def euler_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of tiny_checkpoint, with flow-match Euler as the scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    checkpoint = tmp_path_factory.mktemp("euler") / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(checkpoint / "scheduler")
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    return checkpoint


@pytest.fixture(scope="session")
def euler_report(euler_checkpoint: Path, tiny_bundle: Path) -> BuildReport:
    """The report of building euler_checkpoint over a copy of tiny_bundle, which changes only the manifest."""
    return _build(euler_checkpoint, Path(shutil.copytree(tiny_bundle, euler_checkpoint.parent / "bundle")))


@pytest.fixture(scope="session")
def stochastic_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of tiny_checkpoint, with a sampler that takes fresh noise in every step and two earlier x0."""
    from diffusers import DPMSolverMultistepScheduler

    def make(path: Path) -> None:
        shutil.copytree(tiny_checkpoint, path)
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
            algorithm_type="sde-dpmsolver++",
            solver_order=3,
        ).save_pretrained(path / "scheduler")

    return made_once(tmp_path_factory, "stochastic-checkpoint", make)


@pytest.fixture(scope="session")
def stochastic_bundle(
    stochastic_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built over a copy of tiny_bundle, whose text encoder and VAE are reused."""

    def make(path: Path) -> BuildReport:
        return _build(stochastic_checkpoint, Path(shutil.copytree(tiny_bundle, path)))

    return made_once(tmp_path_factory, "stochastic-bundle", make)


@pytest.fixture(scope="session")
def sd3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded SD3.5-medium checkpoint with three blocks, one of which skip-layer guidance skips."""
    from tiny_sd3 import make_checkpoint

    return made_once(tmp_path_factory, "sd3-checkpoint", lambda path: make_checkpoint(path, "sd3.5-medium"))


@pytest.fixture(scope="session")
def sd3_bundle(sd3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of sd3_checkpoint: fp32, ONNX Runtime. Tests that change files copy it first."""
    return made_once(tmp_path_factory, "sd3-bundle", lambda path: _build(sd3_checkpoint, path))


def _sd3_control(factory: pytest.TempPathFactory, plain: Path, form: str) -> Path:
    from tiny_sd3 import make_control_checkpoint

    return made_once(
        factory,
        f"sd3-control-checkpoint-{form}",
        lambda path: make_control_checkpoint(plain, path, text=form == "with-text"),
    )


@pytest.fixture(scope="session", params=["with-text", "image-only"])
def sd3_control_checkpoint(
    request: pytest.FixtureRequest, sd3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """sd3_checkpoint with a ControlNet of either form. Its posterior has no deviation."""
    return _sd3_control(tmp_path_factory, sd3_checkpoint, request.param)


@pytest.fixture(scope="session")
def sd3_control_bundle(
    sd3_control_checkpoint: Path,
    sd3_checkpoint: Path,
    sd3_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Built over a copy of sd3_bundle, and the second form over the first, whose other stages are reused."""

    def make(path: Path) -> BuildReport:
        return _build(sd3_control_checkpoint, Path(shutil.copytree(base, path)))

    base = sd3_bundle
    if sd3_control_checkpoint.name.endswith("image-only"):
        first = _sd3_control(tmp_path_factory, sd3_checkpoint, "with-text")
        base = made_once(
            tmp_path_factory,
            "sd3-control-bundle-with-text",
            lambda path: _build(first, Path(shutil.copytree(sd3_bundle, path))),
        )
    return made_once(tmp_path_factory, sd3_control_checkpoint.name.replace("checkpoint", "bundle"), make)


@pytest.fixture(scope="session")
def mmdit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded lucidrains/mmdit checkpoint with two blocks. Text encoder and VAE are those of tiny_checkpoint."""
    pytest.importorskip("mmdit", reason="the trunk needs the mmdit package: pip install ditc[dev]")
    from tiny_mmdit import make_checkpoint

    return made_once(tmp_path_factory, "mmdit-checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def mmdit_bundle(mmdit_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of mmdit_checkpoint, built over a copy of tiny_bundle, whose text encoder and VAE are reused."""

    def make(path: Path) -> BuildReport:
        return _build(mmdit_checkpoint, Path(shutil.copytree(tiny_bundle, path)))

    return made_once(tmp_path_factory, "mmdit-bundle", make)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoint that ships with the repository. Tests that change files copy it first."""
    if not DEMO_CHECKPOINT.is_dir():
        pytest.skip(f"{DEMO_CHECKPOINT} is not there: make demo-checkpoint trains it")
    return made_once(tmp_path_factory, "demo-bundle", lambda path: _build(DEMO_CHECKPOINT, path))


def _build(checkpoint: Path, out: Path) -> BuildReport:
    from ditc.export.build.builder import build_bundle
    from ditc.export.contract import BuildOptions

    return build_bundle(checkpoint, out, BuildOptions())
