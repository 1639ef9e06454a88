"""Fixed position embeddings that several families add to their tokens."""

# D channels, F frequencies, h/w tokens per side

from __future__ import annotations

import torch
from torch import Tensor


class SincosPosition:
    """2-D sinusoids in fp32 for any size. Every picture spans the same range, base_size / interpolation_scale units.

    As in diffusers' get_2d_sincos_pos_embed, the first half of the channels encodes the column, the second the row.
    """

    def __init__(self, width: int, base_size: int, interpolation_scale: float) -> None:
        self.base_size = base_size
        self.interpolation_scale = interpolation_scale
        count = width // 4
        exponents = torch.arange(count, dtype=torch.float64, device="cpu") / count
        self.frequencies = (1.0 / 10000**exponents).float()

    def __call__(self, height: int, width: int, device: torch.device) -> Tensor:
        """(1,h*w,D) fp32."""
        column_WF, row_HF = self._axis(width, device), self._axis(height, device)
        grid = torch.cat(
            [column_WF[None].expand(height, -1, -1), row_HF[:, None].expand(-1, width, -1)], dim=2
        )
        return grid.flatten(0, 1)[None]

    def _axis(self, size: int, device: torch.device) -> Tensor:
        positions = (
            torch.arange(size, device=device).float() / (size / self.base_size) / self.interpolation_scale
        )
        angles = positions[:, None] * self.frequencies.to(device)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
