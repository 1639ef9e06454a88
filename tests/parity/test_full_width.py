"""Sana-1.6B's full width with random weights: module by module, ours beside unmodified diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from ditc.export.models.sana import SanaConfig, load_sana
from ditc.parity.bisect import errors_by_place
from ditc.parity.trace import TorchTracer

LAYERS = 2  # 20 of them need 13 GB for both sides; every layer has the same shapes
BOUND = 1e-5  # runtime/tolerances.py, module level, fp32


@pytest.mark.slow
def test_every_module_at_full_width_is_diffusers(record_property) -> None:
    torch.manual_seed(0)
    upstream = SanaTransformer2DModel(num_layers=LAYERS, qk_norm="rms_norm_across_heads").eval()
    conditioner, denoiser = load_sana(
        SanaConfig.from_json(upstream.config), upstream.state_dict(), torch.float32
    )
    values = {
        "hidden_states": torch.randn(2, 32, 16, 16),
        "encoder_hidden_states": torch.randn(2, 300, 2304),
        "encoder_attention_mask": (torch.arange(300)[None] < torch.tensor([[20], [300]])).long(),
        "timestep": torch.tensor([999.0, 37.0]),
    }
    with torch.no_grad():
        conditioning = conditioner(values["encoder_hidden_states"], values["encoder_attention_mask"])
    theirs = TorchTracer(upstream, lambda: upstream(**values), deltas=True)
    ours = TorchTracer(denoiser, lambda: denoiser(values["hidden_states"], values["timestep"], *conditioning))
    errors = [error for error in errors_by_place(theirs, ours) if error.same_form]
    worst = max(errors, key=lambda error: error.error)
    record_property("worst", f"{worst.place} {worst.error:.2e} of {len(errors)} places")
    assert len(errors) > 20 * LAYERS
    assert worst.error <= BOUND, str(worst.place)
