"""Parity of an SD3 bundle with a ControlNet, in both forms: planted defects are caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import context_of, failures, module_of, patch_forward, patch_pipeline, torch_candidate
from torch import Tensor

from ditc.export.build.builder import build_bundle
from ditc.export.families.sd3.network import Sd3Transformer
from ditc.export.options import BuildOptions
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.cli import main
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import CONTROLNET, DENOISER
from ditc.runtime.tolerances import Level

right_forward = Sd3Transformer.forward


def one_block_late(
    self: Any, latents: Tensor, t: Tensor, text: Tensor, pooled: Tensor, *rest: Tensor
) -> Tensor:
    """Sd3Transformer.forward with every residual added after the block that follows the right one."""
    gates, residuals = (rest[:1], rest[1:]) if self.skip_layers else ((), rest)

    def late(added: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda module, inputs, streams: (streams[0] + added.reshape(streams[0].shape), streams[1])

    hooks = [
        block.register_forward_hook(late(residuals[residual]))
        for block, residual in zip(list(self.transformer_blocks)[1:], self.residual_of, strict=True)
    ]
    try:
        none = (torch.zeros_like(residual) for residual in residuals)
        return right_forward(self, latents, t, text, pooled, *gates, *none)
    finally:
        for hook in hooks:
            hook.remove()


class StrongerControl(Pipeline):
    """A pipeline in which control acts with one more than the requested scale."""

    def plan(self, request: Any) -> Any:
        asked = request.controlnet_conditioning_scale
        scale = 1.0 if asked is None else asked
        return super().plan(replace(request, controlnet_conditioning_scale=scale + 1))


def _late(model: TorchModel) -> None:
    patch_forward(module_of(model, DENOISER, "network"), one_block_late)


def _other_weight(model: TorchModel) -> None:
    with torch.no_grad():
        module_of(model, CONTROLNET, "network.pos_embed_input.proj").weight.mul_(1.1)


def _other_offset(model: TorchModel) -> None:
    """The control picture with the VAE's shift_factor where it has none, and without it where it has one."""
    control = module_of(model, CONTROLNET)
    control.offset = 0.0 if control.offset else 0.0609  # type: ignore[assignment]


@dataclass(frozen=True)
class Defect:
    """What is planted, the level that must find it, and what the result must name."""

    plant: Callable[[TorchModel], object]
    level: Level
    stage: str
    module: str
    between: tuple[str, str] | None = None
    cause: str = ""


BEHIND_THE_FIRST_BLOCK = (
    "output of network.transformer_blocks.0",
    "input of network.transformer_blocks.1",
)
LATE = "residuals one block late"
DEFECTS = {
    LATE: Defect(_late, Level.STAGE, DENOISER, "network", BEHIND_THE_FIRST_BLOCK),
    "another weight": Defect(_other_weight, Level.STAGE, CONTROLNET, "network.pos_embed_input.proj"),
    "another offset": Defect(
        _other_offset,
        Level.STAGE,
        CONTROLNET,
        "network",
        ("output of network.pos_embed", "input of network.pos_embed_input.proj"),
    ),
    "scale off by one": Defect(
        lambda model: patch_pipeline(model, StrongerControl),
        Level.STEP,
        "pipeline",
        "what the denoiser is fed",
        cause="control_scale",
    ),
}


@pytest.mark.parametrize(
    "name", [LATE, *(pytest.param(name, marks=pytest.mark.slow) for name in DEFECTS if name != LATE)]
)
def test_a_planted_defect_is_caught_and_named(name: str, sd3_control_checkpoint: Path) -> None:
    defect = DEFECTS[name]
    candidate = torch_candidate(sd3_control_checkpoint, defect.plant)
    found = failures(context_of(sd3_control_checkpoint, candidate), defect.level)
    assert found, f"{name} passes"
    assert {result.stage for result in found} == {defect.stage}
    culprit = found[0].culprit
    assert culprit is not None
    assert (culprit.module, culprit.between) == (defect.module, defect.between), str(culprit)
    assert any(defect.cause in cause for cause in found[0].causes) or not defect.cause, found[0].causes


@pytest.fixture(scope="module")
def late_bundle(
    sd3_control_checkpoint: Path, sd3_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle whose denoiser was exported while it added every residual one block late."""
    out = Path(shutil.copytree(sd3_bundle, tmp_path_factory.mktemp("late") / "bundle"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sd3Transformer, "forward", one_block_late)
        build_bundle(sd3_control_checkpoint, out, BuildOptions())
    return out


@pytest.mark.slow
def test_the_command_names_the_defect_of_a_bundle(
    late_bundle: Path, sd3_control_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ditc parity` from the files of a bundle: graphs of ONNX Runtime against diffusers and PyTorch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    case = ["--prompts", str(prompts), "--seeds", "0", "--threads", "1", "--json"]
    assert main(["parity", str(late_bundle), "--against", str(sd3_control_checkpoint), *case]) == 1
    failed = [r for r in json.loads(capsys.readouterr().out)["levels"] if r["verdict"] == "fail"]
    # The picture stays within its bound (50.2 dB), because the weights of these networks are random.
    assert {r["level"] for r in failed} >= {"stage", "step", "trajectory"}
    named = {
        (r["where"]["stage"], r["where"]["module"], tuple(r["where"]["between"]))
        for r in failed
        if r["level"] in ("stage", "step")
    }
    assert named == {(DENOISER, "network", BEHIND_THE_FIRST_BLOCK)}, named
