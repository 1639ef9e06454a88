"""What is planned of a SANA-Sprint checkpoint, and which combinations of its parts are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from pictures import Reference, assert_same, draw

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.export.families.sana.network import SanaConfig, load_sana
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.errors import CheckpointError
from ditc.runtime.step_contract import GuidanceMode


@pytest.fixture
def checkpoint(sprint_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sprint_checkpoint, tmp_path / "checkpoint"))


def plan_of(path: Path, **options: Any) -> ModelPlan:
    opened = open_checkpoint(path)
    return find_adapter(opened).plan(opened, BuildOptions(**options))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_defaults_are_those_of_the_sprint_pipeline(checkpoint: Path) -> None:
    plan = plan_of(checkpoint)
    assert (plan.defaults.num_inference_steps, plan.defaults.guidance_scale) == (2, 4.5)
    assert plan.step.guidance is GuidanceMode.EMBEDDED and plan.step.noise and plan.step.rows_per_sample == 1
    (checkpoint / "ditc.json").unlink()
    edit(checkpoint / "transformer" / "config.json", sample_size=32)
    defaults = plan_of(checkpoint, resolution=1024).defaults
    assert defaults.num_inference_steps == 2 and (1024, 1024) in defaults.bins


def test_a_checkpoints_own_angles_are_its_bundles_defaults(checkpoint: Path) -> None:
    edit(checkpoint / "ditc.json", max_timesteps=1.5, intermediate_timesteps=None, num_inference_steps=2)
    ours = draw(TorchModel(checkpoint).pipeline, "red cat", seed=1, height=32, width=32)
    given = {"max_timesteps": 1.5, "intermediate_timesteps": None, "height": 32, "width": 32}
    assert_same(ours, Reference(checkpoint).draw("red cat", seed=1, **given))
    edit(checkpoint / "ditc.json", max_timesteps="x")
    with pytest.raises(CheckpointError, match="max_timesteps"):
        plan_of(checkpoint)


def test_other_scales_are_read_and_timestep_scale_is_not_as_in_diffusers(checkpoint: Path) -> None:
    edit(checkpoint / "transformer" / "config.json", guidance_embeds_scale=2.5, timestep_scale=0.001)
    edit(checkpoint / "scheduler" / "scheduler_config.json", sigma_data=0.7)
    size = {"height": 32, "width": 32, "guidance_scale": 3.0}
    ours = draw(TorchModel(checkpoint).pipeline, "red cat", seed=1, **size)
    assert_same(ours, Reference(checkpoint).draw("red cat", seed=1, **size))


def test_parts_of_different_models_are_refused(
    checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def refusal(path: Path) -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            plan_of(path)
        assert caught.value.hint
        return caught.value

    edit(checkpoint / "model_index.json", _class_name="SanaPipeline")
    assert "only SanaSprintPipeline is served: the transformer is SANA-Sprint's" in str(refusal(checkpoint))
    edit(checkpoint / "model_index.json", _class_name="SanaSprintImg2ImgPipeline")
    assert "it starts from a picture" in str(refusal(checkpoint))
    index = {
        "_class_name": "SanaSprintPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    edit(checkpoint / "model_index.json", **index)
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
        checkpoint / "scheduler"
    )
    assert "needs SCMScheduler" in str(refusal(checkpoint))
    sana = Path(shutil.copytree(tiny_checkpoint, tmp_path / "sana"))
    edit(sana / "model_index.json", scheduler=["diffusers", "SCMScheduler"])
    (sana / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "SCMScheduler"}')
    assert "the scheduler is SCMScheduler" in str(refusal(sana))


@pytest.mark.slow
def test_one_layer_at_full_width_equals_diffusers(seed_weights: Any, relative_l2: Any) -> None:
    """Sprint 1.6B: 70 heads of 32, 20 of 112, qk-norm and the guidance embedding."""
    module = seed_weights(
        SanaTransformer2DModel(num_layers=1, qk_norm="rms_norm_across_heads", guidance_embeds=True)
    )
    conditioner, denoiser = load_sana(SanaConfig.from_json(module.config), module.state_dict(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(2, 32, 8, 12, generator=generator),
        torch.randn(2, 9, 2304, generator=generator),
    )
    mask, time = torch.ones(2, 9, dtype=torch.long), torch.tensor([1.0, 0.78])
    scale = torch.tensor([4.5, 1.0])
    ours = denoiser(latents, time, scale, *conditioner(text, mask))
    theirs = module(latents, text, time, guidance=scale * 0.1, encoder_attention_mask=mask).sample
    assert relative_l2(ours, theirs) <= 1e-5
    assert np.isfinite(ours.numpy()).all()
