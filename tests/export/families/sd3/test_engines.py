"""Engines of an SD3 bundle, built ahead of time: three text encoders, a conditioner without weights, a skip gate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ditc.export.build.builder import build_bundle
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.spec import DENOISER, Backend, Precision

pytest.importorskip("tensorrt_rtx")


@pytest.mark.slow
def test_every_stage_gets_an_engine(sd3_checkpoint: Path, sd3_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(sd3_bundle, tmp_path / "bundle"))
    options = BuildOptions(backend=Backend.TENSORRT_RTX, targets=("sm89",), precision=Precision.FP16)
    build_bundle(sd3_checkpoint, out, options)
    stages = load_manifest(out).stages
    engines = {
        name: [artifact for artifact in stage.artifacts if artifact.backend is Backend.TENSORRT_RTX]
        for name, stage in stages.items()
    }
    assert all(len(found) == 1 and found[0].targets == ("sm89",) for found in engines.values()), engines
    assert engines[DENOISER][0].precision is Precision.FP16
    assert {engines[f"text_encoder{n}"][0].precision for n in ("", "_2", "_3")} == {Precision.BF16}
