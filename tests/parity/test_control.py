"""Parity of a bundle with a ControlNet: it passes at all levels against diffusers, and a planted defect is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import context_of, failures, module_of, patch_forward, torch_candidate
from torch import Tensor

from ditc.parity.levels import LEVELS
from ditc.parity.results import Verdict
from ditc.runtime.cli import main
from ditc.runtime.spec import CONTROLNET, DENOISER
from ditc.runtime.tolerances import Level


def test_a_bundle_passes_at_every_level(
    control_bundle: Path, control_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, prompts = Path(shutil.copytree(control_bundle, tmp_path / "bundle")), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    case = ["--prompts", str(prompts), "--seeds", "0", "--threads", "1"]
    assert main(["parity", str(bundle), "--against", str(control_checkpoint), *case]) == 0
    (entry,) = json.loads((bundle / "certificate.json").read_text())["entries"]
    assert {line["name"] for line in entry["parity"]["lines"] if line["passed"]} >= {
        level.value for level in LEVELS
    }


@pytest.mark.slow
def test_an_sd3_bundle_passes_at_every_level(
    sd3_control_bundle: Path, sd3_control_checkpoint: Path, tmp_path: Path
) -> None:
    test_a_bundle_passes_at_every_level(sd3_control_bundle, sd3_control_checkpoint, tmp_path)


def _one_block_late(self: Any, latents: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
    """SanaDenoiser.forward with every residual added after the block that follows the right one."""
    first = len(rest) - self.residuals
    late = zip(list(self.transformer_blocks)[2:], rest[first:], strict=False)
    hooks = [
        block.register_forward_hook(lambda module, inputs, out, added=added: out + added.reshape(out.shape))
        for block, added in late
    ]
    try:
        none = (torch.zeros_like(residual) for residual in rest[first:])
        return type(self).forward(self, latents, t, *rest[:first], *none)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("level", [Level.STAGE, Level.STEP])
def test_residuals_that_are_added_one_block_late_are_caught_and_named(
    control_checkpoint: Path, level: Level
) -> None:
    def plant(model: Any) -> None:
        patch_forward(module_of(model, DENOISER, "network"), _one_block_late)

    context = context_of(control_checkpoint, torch_candidate(control_checkpoint, plant))
    found = failures(context, level)
    assert {result.stage for result in found} == {DENOISER}
    culprit = found[0].culprit
    assert culprit is not None
    assert (culprit.stage, culprit.module) == (DENOISER, "network")
    assert culprit.between == (
        "output of network.transformer_blocks.1",
        "input of network.transformer_blocks.2",
    ), culprit.between
    healthy = context_of(control_checkpoint, torch_candidate(control_checkpoint))
    assert all(result.verdict is Verdict.PASS for result in LEVELS[level](healthy))


@pytest.mark.parametrize(("level", "stage"), [(Level.STAGE, CONTROLNET), (Level.STEP, DENOISER)])
def test_a_controlnet_with_another_weight_is_caught_and_named(
    control_checkpoint: Path, level: Level, stage: str
) -> None:
    """A step is the denoiser's, with the ControlNet before it: what begins in the ControlNet is not blamed on it."""

    def plant(model: Any) -> None:
        with torch.no_grad():
            module_of(model, CONTROLNET, "network.input_block").weight.mul_(1.1)

    found = failures(context_of(control_checkpoint, torch_candidate(control_checkpoint, plant)), level)
    assert {result.stage for result in found} == {stage}
    assert found[0].culprit is not None
    assert (found[0].culprit.stage, found[0].culprit.module) == (CONTROLNET, "network.input_block")
