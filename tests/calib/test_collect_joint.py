"""Ranges of a joint-attention network whose batches also have rows that skip layers."""

from __future__ import annotations

from pathlib import Path

from ditc.calib.collect import Settings, collect
from ditc.export.quant.layers import quantizable_layers
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.spec import DENOISER


def test_every_linear_is_measured_at_every_step_with_the_rows_it_has(
    sd3_checkpoint: Path, tmp_path: Path
) -> None:
    ranges = collect(sd3_checkpoint, ["a red cat"], tmp_path / "ranges", Settings(num_inference_steps=5))
    layers = quantizable_layers(TorchModel(sd3_checkpoint).load(DENOISER))
    assert set(ranges.site_of) == set(layers)
    per_row = 4 * 4  # tokens of a 64 px picture
    rows = ranges.of("transformer_blocks.0.attn2.to_q").rows
    assert rows.tolist() == [n * per_row for n in (2, 3, 3, 3, 2)], "guidance has a third row in its window"
    assert ranges.of("transformer_blocks.0.attn.add_q_proj").rows.sum() == 13 * (77 + 16)
