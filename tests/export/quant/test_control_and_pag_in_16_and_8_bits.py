"""Bundles with a ControlNet, or with perturbed-attention guidance, in 16 and 8 bits: they are built, and parity passes.

The 8-bit builds of a ControlNet quantize the denoiser and the ControlNet. In FP8, ONNX Runtime rounds the numbers and
computes in fp32, which shows the numerical error. Engines are built, and not run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import need_openvino

from ditc.calib.collect import Settings, collect
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.spec import CONTROL_CONDITIONER, CONTROLNET, DENOISER, Backend

pytestmark = pytest.mark.slow

PROMPTS = ["a red heart", "blue cat"]
FORMS = [
    ("onnxruntime", "fp16"),
    ("openvino", "bf16"),
    *(
        (backend, precision)
        for precision in ("int8-dynamic", "int8")
        for backend in ("onnxruntime", "openvino")
    ),
    ("onnxruntime", "fp8"),
]
CALIBRATED = ("int8", "fp8")
ENGINES = ("fp32", "fp16", "bf16", *CALIBRATED)


@dataclass(frozen=True)
class Model:
    """A checkpoint, a bundle to which every test adds what it builds, and ranges by stage."""

    family: str
    checkpoint: Path
    bundle: Path
    ranges: dict[str, Path]

    def options(self, precision: str) -> list[str]:
        """The options of an 8-bit build: the recipe of a ControlNet, and the ranges."""
        recipe = ["--recipe", f"{self.family}-controlnet-{precision}"] if CONTROLNET in self.ranges else []
        measured = [word for path in self.ranges.values() for word in ("--ranges", str(path))]
        if precision in CALIBRATED:
            return recipe + measured
        return recipe if precision == "int8-dynamic" else []


def _measured(family: str, checkpoint: Path, bundle: Path, folder: Path, *stages: str) -> Model:
    ranges = {stage: folder / f"{stage}.safetensors" for stage in stages}
    for stage, path in ranges.items():
        collect(checkpoint, PROMPTS, path, Settings(num_inference_steps=2, stage=stage))
    return Model(family, checkpoint, Path(shutil.copytree(bundle, folder / "bundle")), ranges)


@pytest.fixture(scope="module")
def sana_control(
    control_checkpoint: Path, control_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    folder = tmp_path_factory.mktemp("control")
    return _measured("sana", control_checkpoint, control_bundle, folder, DENOISER, CONTROLNET)


@pytest.fixture(scope="module")
def sd3_control(
    sd3_control_checkpoint: Path, sd3_control_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """Both forms of ControlNet, one after the other."""
    folder = tmp_path_factory.mktemp("sd3-control")
    return _measured("sd3", sd3_control_checkpoint, sd3_control_bundle, folder, DENOISER, CONTROLNET)


@pytest.fixture(scope="module")
def pag(pag_checkpoint: Path, pag_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _measured("sana", pag_checkpoint, pag_bundle, tmp_path_factory.mktemp("pag"), DENOISER)


def precisions_that_pass(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> dict[str, str]:
    """Build, run parity, and return the precisions that were compared."""
    if backend == "openvino":
        need_openvino()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    chosen = ["--backend", backend, "--precision", precision]
    build = [str(model.checkpoint), "-o", str(model.bundle), *chosen, *model.options(precision)]
    assert main(["build", *build]) == 0
    capsys.readouterr()
    eight = precision in (*CALIBRATED, "int8-dynamic") and CONTROLNET in model.ranges
    stage = ["--stage-precision", f"{CONTROLNET}={precision}"] if eight else []
    case = ["--prompts", str(prompts), "--seeds", "0", "--threads", "1", "--json"]
    code = main(["parity", str(model.bundle), "--against", str(model.checkpoint), *chosen, *stage, *case])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, [one for one in report["levels"] if one["verdict"] == "fail"]
    passed = {(one["level"], one["stage"]) for one in report["levels"] if one["verdict"] == "pass"}
    assert {level for level, _ in passed} >= {"graph", "stage", "step", "trajectory", "picture"}
    assert {stage for level, stage in passed if level == "stage"} >= {DENOISER, *model.ranges}
    return dict(report["subject"]["precisions"])


def build_engines(model: Model, precision: str) -> None:
    """Build engines on this CPU, and check that the denoiser and the ControlNet have one in the precision."""
    pytest.importorskip("tensorrt_rtx")
    engine = ["--backend", "tensorrt-rtx", "--targets", "sm89", "--precision", precision]
    assert (
        main(["build", str(model.checkpoint), "-o", str(model.bundle), *engine, *model.options(precision)])
        == 0
    )
    engines = {
        name: [a for a in stage.artifacts if a.backend is Backend.TENSORRT_RTX]
        for name, stage in load_manifest(model.bundle).stages.items()
    }
    assert all(engines.values())
    for name in (DENOISER, CONTROLNET):
        (built,) = (a for a in engines[name] if a.precision.value == precision)
        assert built.targets == ("sm89",) and (model.bundle / built.file.path).stat().st_size > 0
    others = {a.precision.value for name in engines if name not in model.ranges for a in engines[name]}
    assert others <= {"fp32", "fp16", "bf16"}


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_a_bundle_of_sana_with_a_controlnet(
    sana_control: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> None:
    found = precisions_that_pass(sana_control, tmp_path, capsys, backend, precision)
    assert (found[DENOISER], found[CONTROLNET]) == (precision, precision)
    assert found[CONTROL_CONDITIONER] in ("fp32", "fp16", "bf16")


@pytest.mark.parametrize("precision", ENGINES)
def test_engines_of_sana_with_a_controlnet_are_built_on_a_cpu(sana_control: Model, precision: str) -> None:
    build_engines(sana_control, precision)


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_a_bundle_of_sd3_with_a_controlnet(
    sd3_control: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> None:
    found = precisions_that_pass(sd3_control, tmp_path, capsys, backend, precision)
    assert (found[DENOISER], found[CONTROLNET]) == (precision, precision)


@pytest.mark.parametrize("precision", ENGINES)
def test_engines_of_sd3_with_a_controlnet_are_built_on_a_cpu(sd3_control: Model, precision: str) -> None:
    build_engines(sd3_control, precision)


@pytest.mark.parametrize(("backend", "precision"), FORMS[2:])
def test_a_bundle_with_perturbed_attention_guidance(
    pag: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> None:
    assert precisions_that_pass(pag, tmp_path, capsys, backend, precision)[DENOISER] == precision
