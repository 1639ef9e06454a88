"""Checkpoints and bundles that many tests share, made once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
