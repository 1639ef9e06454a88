"""Bundles with a ControlNet, or with perturbed-attention guidance, in 16 and 8 bits: they are built, and parity passes.

The 8-bit builds of a ControlNet quantize the denoiser and the ControlNet. In FP8, ONNX Runtime rounds the numbers and
computes in fp32, which shows the numerical error.
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


@dataclass(frozen=True)
class Model:
    """A checkpoint, its fp32 bundle, and ranges by stage."""

    checkpoint: Path
    bundle: Path
    ranges: dict[str, Path]

    @property
    def measured(self) -> list[str]:
        """The options that give a build these ranges."""
        return [word for path in self.ranges.values() for word in ("--ranges", str(path))]


def _measured(checkpoint: Path, bundle: Path, folder: Path, *stages: str) -> Model:
    ranges = {stage: folder / f"{stage}.safetensors" for stage in stages}
    for stage, path in ranges.items():
        collect(checkpoint, PROMPTS, path, Settings(num_inference_steps=2, stage=stage))
    return Model(checkpoint, bundle, ranges)


@pytest.fixture(scope="module")
def control(
    control_checkpoint: Path, control_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    folder = tmp_path_factory.mktemp("control")
    return _measured(control_checkpoint, control_bundle, folder, DENOISER, CONTROLNET)


@pytest.fixture(scope="module")
def pag(pag_checkpoint: Path, pag_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _measured(pag_checkpoint, pag_bundle, tmp_path_factory.mktemp("pag"), DENOISER)


def precisions_that_pass(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> dict[str, str]:
    """Build over a copy of the fp32 bundle, run parity, and return the precisions that were compared."""
    if backend == "openvino":
        need_openvino()
    bundle, prompts = Path(shutil.copytree(model.bundle, tmp_path / "bundle")), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    chosen = ["--backend", backend, "--precision", precision]
    options, stage = [], []
    if precision in (*CALIBRATED, "int8-dynamic") and CONTROLNET in model.ranges:
        options += ["--recipe", f"sana-controlnet-{precision}"]
        stage = ["--stage-precision", f"{CONTROLNET}={precision}"]
    if precision in CALIBRATED:
        options += model.measured
    assert main(["build", str(model.checkpoint), "-o", str(bundle), *chosen, *options]) == 0
    capsys.readouterr()
    case = ["--prompts", str(prompts), "--seeds", "0", "--threads", "1", "--json"]
    code = main(["parity", str(bundle), "--against", str(model.checkpoint), *chosen, *stage, *case])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, [one for one in report["levels"] if one["verdict"] == "fail"]
    passed = {(one["level"], one["stage"]) for one in report["levels"] if one["verdict"] == "pass"}
    assert {level for level, _ in passed} >= {"graph", "stage", "step", "trajectory", "picture"}
    assert {stage for level, stage in passed if level == "stage"} >= {DENOISER, *model.ranges}
    return dict(report["subject"]["precisions"])


@pytest.mark.parametrize(("backend", "precision"), FORMS)
def test_a_bundle_with_a_controlnet(
    control: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> None:
    found = precisions_that_pass(control, tmp_path, capsys, backend, precision)
    assert (found[DENOISER], found[CONTROLNET]) == (precision, precision)
    assert found[CONTROL_CONDITIONER] in ("fp32", "fp16", "bf16")


@pytest.mark.parametrize(("backend", "precision"), FORMS[2:])
def test_a_bundle_with_perturbed_attention_guidance(
    pag: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str, precision: str
) -> None:
    assert precisions_that_pass(pag, tmp_path, capsys, backend, precision)[DENOISER] == precision


@pytest.fixture(scope="module")
def bundle_of_engines(control: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fp32 bundle, to which the tests add engines. Those of text encoder and VAE are built once."""
    return Path(shutil.copytree(control.bundle, tmp_path_factory.mktemp("engines") / "bundle"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_engines_of_a_controlnet_are_built_on_a_cpu(
    control: Model, bundle_of_engines: Path, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = ["--backend", "tensorrt-rtx", "--targets", "sm89", "--precision", precision]
    if precision in CALIBRATED:
        engine += ["--recipe", f"sana-controlnet-{precision}", *control.measured]
    assert main(["build", str(control.checkpoint), "-o", str(bundle_of_engines), *engine]) == 0
    stages = load_manifest(bundle_of_engines).stages
    engines = {
        name: [a for a in stage.artifacts if a.backend is Backend.TENSORRT_RTX]
        for name, stage in stages.items()
    }
    assert all(engines.values())
    for name in (DENOISER, CONTROLNET):
        (built,) = (a for a in engines[name] if a.precision.value == precision)
        assert built.targets == ("sm89",) and (bundle_of_engines / built.file.path).stat().st_size > 0
    assert {a.precision.value for a in engines[CONTROL_CONDITIONER]} <= {"fp32", "fp16", "bf16"}
