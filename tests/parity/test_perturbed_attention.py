"""Parity of a Sana bundle with perturbed-attention guidance, and defects of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from planted import (
    SETTINGS,
    InvertedGate,
    StrongerPerturbation,
    context_of,
    failures,
    module_of,
    patch_pipeline,
    torch_candidate,
)
from tiny_sana import make_pag_checkpoint

from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Verdict
from ditc.runtime.spec import DENOISER
from ditc.runtime.tolerances import Level

BLOCK = "network.transformer_blocks"


@pytest.fixture(scope="module", params=[None, "rms_norm_across_heads"], ids=["Sana", "SANA-1.5"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With and without qk-norm, which diffusers' own processors leave out."""
    return make_pag_checkpoint(tmp_path_factory.mktemp("pag") / "checkpoint", qk_norm=request.param)


@pytest.mark.parametrize("level", [Level.MODULE, Level.STEP, Level.TRAJECTORY, Level.PICTURE])
def test_every_level_agrees_with_diffusers(checkpoint: Path, level: Level) -> None:
    context = context_of(checkpoint, torch_candidate(checkpoint), with_upstream=True)
    results = list(LEVELS[level](context))
    assert not [result for result in results if result.verdict is Verdict.FAIL]
    assert [result for result in results if result.verdict is Verdict.PASS]
    upstream = context.upstream()
    assert upstream is not None and type(upstream.pipeline).__name__ == "SanaPAGPipeline"


def test_layers_of_ditc_json_are_drawn_with_guidance_of_diffusers(checkpoint: Path, tmp_path: Path) -> None:
    """A SanaPipeline whose ditc.json names layers is compared with the pipeline that has them in diffusers."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPipeline"}))
    settings = json.loads((copy / "ditc.json").read_text())
    settings |= {
        "pag_applied_layers": [0, "transformer_blocks.1"],
        "pag_scale": 1.5,
        "pag_adaptive_scale": 0.004,
    }
    (copy / "ditc.json").write_text(json.dumps(settings))
    context = context_of(copy, torch_candidate(copy), with_upstream=True)
    for level in (Level.MODULE, Level.PICTURE):
        assert not [result for result in LEVELS[level](context) if result.verdict is Verdict.FAIL]


@dataclass(frozen=True)
class Defect:
    """What is planted, the level that must find it, and what the result must name."""

    plant: Callable[[TorchModel], object]
    level: Level
    stage: str
    module: str
    cause: str = ""


def _another_layer(model: TorchModel) -> None:
    for index, perturbed in enumerate((True, False)):
        module_of(model, DENOISER, f"{BLOCK}.{index}").perturbed = perturbed


def _inverted(model: TorchModel) -> None:
    attention = module_of(model, DENOISER, f"{BLOCK}.1.attn1")
    forward = attention.forward
    attention.forward = lambda x, gate: forward(x, 1 - gate)


def _no_output_projection(model: TorchModel) -> None:
    """The identity without the projection after it: what is added is the value itself."""
    attention = module_of(model, DENOISER, f"{BLOCK}.1.attn1")
    forward = attention.forward

    def identity(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.where((gate > 0.5)[:, None, None], attention.to_v(x), forward(x, gate))

    attention.forward = identity


DEFECTS = {
    "applied to another layer": Defect(_another_layer, Level.STEP, DENOISER, f"{BLOCK}.0.attn1"),
    "gate inverted in the network": Defect(_inverted, Level.STEP, DENOISER, f"{BLOCK}.1.attn1"),
    "output projection left out": Defect(_no_output_projection, Level.STEP, DENOISER, f"{BLOCK}.1.attn1"),
    "gate inverted in the pipeline": Defect(
        lambda model: patch_pipeline(model, InvertedGate),
        Level.STEP,
        "pipeline",
        "what the denoiser is fed",
        "wrong gate: rows [0, 1]",
    ),
    "scale off by one": Defect(
        lambda model: patch_pipeline(model, StrongerPerturbation),
        Level.STEP,
        "pipeline",
        "what the denoiser is fed",
        "scale of the gated rows is 4, but 3",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught_and_named(name: str, pag_checkpoint: Path) -> None:
    defect = DEFECTS[name]
    context = context_of(pag_checkpoint, torch_candidate(pag_checkpoint, defect.plant), SETTINGS)
    found = failures(context, defect.level)
    assert found, f"{name} passes"
    assert found[0].stage == defect.stage
    assert found[0].culprit is not None
    assert found[0].culprit.module.removesuffix(".to_out.0") == defect.module, str(found[0].culprit)
    assert any(defect.cause in cause for cause in found[0].causes) or not defect.cause, found[0].causes
