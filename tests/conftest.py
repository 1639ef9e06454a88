"""Checkpoints and bundles that many tests share, made once a session."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ditc.export.bundle import BuildReport

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import tiny_sana and other helpers

ROOT = Path(__file__).parents[1]
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Sana checkpoint with two layers in diffusers layout."""
    from tiny_sana import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """Its bundle: fp32, ONNX Runtime. Tests that change files copy it first."""
    from ditc.export.bundle import build_bundle
    from ditc.export.stages import BuildOptions

    return build_bundle(tiny_checkpoint, tiny_checkpoint.parent / "bundle", BuildOptions()).bundle


@pytest.fixture(scope="session")
def euler_checkpoint(tiny_checkpoint: Path) -> Path:
    """The same weights with flow-match Euler as their scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    checkpoint = tiny_checkpoint.parent / "euler"
    shutil.copytree(tiny_checkpoint, checkpoint)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(checkpoint / "scheduler")
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    return checkpoint


@pytest.fixture(scope="session")
def euler_report(euler_checkpoint: Path, tiny_bundle: Path) -> BuildReport:
    """What building it into a copy of the other scheduler's bundle did: nothing but the manifest."""
    from ditc.export.bundle import build_bundle
    from ditc.export.stages import BuildOptions

    out = tiny_bundle.parent / "euler-bundle"
    shutil.copytree(tiny_bundle, out)
    return build_bundle(euler_checkpoint, out, BuildOptions())


@pytest.fixture(scope="session")
def sd3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded SD3.5-medium checkpoint with three blocks, one of which skip-layer guidance skips."""
    from tiny_sd3 import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("sd3") / "checkpoint", "sd3.5-medium")


@pytest.fixture(scope="session")
def sd3_bundle(sd3_checkpoint: Path) -> Path:
    """Its bundle: fp32, ONNX Runtime."""
    from ditc.export.bundle import build_bundle
    from ditc.export.stages import BuildOptions

    return build_bundle(sd3_checkpoint, sd3_checkpoint.parent / "bundle", BuildOptions()).bundle


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoint that ships with the repository."""
    from ditc.export.bundle import build_bundle
    from ditc.export.stages import BuildOptions

    if not DEMO_CHECKPOINT.is_dir():
        pytest.skip(f"{DEMO_CHECKPOINT} is not there: make demo-checkpoint trains it")
    return build_bundle(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "bundle", BuildOptions()).bundle
