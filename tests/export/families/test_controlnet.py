"""ControlNets: what does not fit is refused before weights are read, and a layer of full width equals diffusers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel, SD3ControlNetModel
from torch import nn

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.families.sana import controlnet as sana
from ditc.export.families.sana.text import MASK_BIAS
from ditc.export.families.sd3 import controlnet as sd3
from ditc.export.families.sd3.network import residual_of_blocks
from ditc.runtime.errors import CheckpointError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.spec import CONTROL_CONDITIONER, CONTROLNET, DENOISER


def plan_of(checkpoint: Path, options: BuildOptions) -> Any:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, options)


def refusal(source: Path, tmp_path: Path, **changes: Any) -> CheckpointError:
    """The error of planning a copy of the checkpoint after these changes to its controlnet/config.json."""
    checkpoint = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    path = checkpoint / "controlnet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as caught:
        plan_of(checkpoint, BuildOptions())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "the ControlNet has 3 layers, but the transformer adds at most 2 residuals"),
        ({"in_channels": 4, "out_channels": 4}, "in_channels is 4 in the ControlNet's config.json, but 8"),
        ({"num_attention_heads": 4, "cross_attention_dim": 64}, "width is 64"),
        ({"caption_channels": 12}, "caption_channels is 12"),
        ({"qk_norm": "rms_norm_across_heads"}, "is not a setting of a SanaControlNetModel"),
        ({"extra": 1}, "unknown setting extra"),
    ],
)
def test_a_controlnet_of_another_sana_is_refused(
    control_checkpoint: Path, tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    assert message in str(refusal(control_checkpoint, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_layers": 4},
            "the ControlNet has 4 layers, but the transformer's 4 blocks add only 3 residuals",
        ),
        ({"extra_conditioning_channels": 1}, "made for inpainting"),
        ({"use_pos_embed": True, "pos_embed_type": None}, "only 'sincos' is implemented"),
        ({"pooled_projection_dim": 10}, "pooled_projection_dim is 10"),
        ({"num_attention_heads": 3, "caption_projection_dim": 48}, "width is 48"),
    ],
)
def test_a_controlnet_of_another_sd3_is_refused(
    sd3_control_checkpoint: Path, tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    assert message in str(refusal(sd3_control_checkpoint, tmp_path, **changes))


def test_the_stages_of_a_16_bit_build_fit_together(control_checkpoint: Path) -> None:
    from ditc.runtime.spec import Precision

    stages = plan_of(control_checkpoint, BuildOptions(precision=Precision.FP16)).stages
    given = {tensor for name in (CONTROLNET, CONTROL_CONDITIONER) for tensor in stages[name].spec.outputs}
    wanted = {*stages[DENOISER].spec.inputs, *stages[CONTROLNET].spec.inputs}
    assert given <= wanted
    assert list(stages).index(CONTROLNET) < list(stages).index(DENOISER)


def test_a_plan_without_a_controlnet_has_none_of_its_tensors(tiny_checkpoint: Path) -> None:
    stages = plan_of(tiny_checkpoint, BuildOptions()).stages
    assert not {CONTROLNET, CONTROL_CONDITIONER} & stages.keys()
    assert not [tensor.name for tensor in stages[DENOISER].spec.inputs if "control" in tensor.name]


def test_residuals_are_spread_as_in_diffusers() -> None:
    assert residual_of_blocks(24, 6) == [index // 4 for index in range(23)]
    assert residual_of_blocks(38, 19) == [index // 2 for index in range(37)]
    assert residual_of_blocks(24, 0) == []


def _large_weights(model: nn.Module) -> None:
    """diffusers makes the layers of a ControlNet with zeros, which would hide every error."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn_like(parameter))
            assert parameter.any(), name


@pytest.mark.slow
def test_a_layer_of_sanas_controlnet_at_full_width_equals_diffusers() -> None:
    torch.manual_seed(0)
    theirs = SanaControlNetModel(num_layers=1).eval()
    _large_weights(theirs)
    conditioner, ours = sana.load_control(
        sana.control_config(theirs.config), theirs.state_dict(), torch.float32
    )
    latents, control = torch.randn(2, 32, 16, 24), torch.randn(2, 32, 16, 24)
    text, mask = torch.randn(2, 40, 2304), torch.ones(2, 40)
    mask[1, 30:] = 0
    time = torch.tensor([900.0, 20.0])
    with torch.inference_mode():
        (expected,) = theirs(latents, text, time, control, encoder_attention_mask=mask, return_dict=False)[0]
        (found,) = ours(latents, time, control, conditioner(text), (1 - mask) * MASK_BIAS)
    assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5  # only the order of sums differs


@pytest.mark.slow
@pytest.mark.parametrize("text", [True, False], ids=["with-text", "image-only"])
def test_a_layer_of_sd3s_controlnet_at_full_width_equals_diffusers(text: bool) -> None:
    torch.manual_seed(0)
    facts: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 24, "caption_projection_dim": 1536}
    if not text:
        facts |= {"joint_attention_dim": None, "force_zeros_for_pooled_projection": False}
    theirs = SD3ControlNetModel(**facts).eval()
    _large_weights(theirs)
    config = sd3.ControlConfig.from_json(theirs.config)
    tensors = sd3.control_tensors(config, theirs.state_dict(), {})
    ours = sd3.load_control(config, tensors, torch.float32)
    latents, control, pooled = torch.randn(2, 16, 32, 24), torch.randn(2, 16, 32, 24), torch.randn(2, 2048)
    states = torch.randn(2, 50, 4096)
    time = torch.tensor([900.0, 20.0])
    with torch.inference_mode():
        (expected,) = theirs(
            latents,
            control,
            encoder_hidden_states=states if text else None,
            pooled_projections=torch.zeros_like(pooled) if text else pooled,
            timestep=time,
            return_dict=False,
        )[0]
        (found,) = ours(latents, time, control, states if text else pooled)
    assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5  # only the order of sums differs
