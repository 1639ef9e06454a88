"""Fixed positions: sinusoids that are added to tokens, and angles by which q and k are rotated."""

# D channels, F frequencies, h/w tokens per side, N tokens of a video, E = D/2 pairs of channels

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


class RotaryPosition3d:
    """Cosines and sines in fp32 for tokens of a video, as in Wan (arXiv 2503.20314) and diffusers' WanRotaryPosEmbed.

    The pairs of channels of a head are divided among frame, row and column: rows and columns have head_dim // 6 pairs
    each, and frames the rest. The angles are computed in fp64, as diffusers does.

    Args:
        longest: the number of frames, rows and columns that the tables cover. The index of a larger one is refused.
    """

    def __init__(self, head_dim: int, longest: int, theta: float = 10000.0) -> None:
        side = 2 * (head_dim // 6)
        self.cos_of_axes, self.sin_of_axes = [], []
        for dim in (head_dim - 2 * side, side, side):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
            places = torch.arange(longest, dtype=torch.float64, device="cpu")
            angles_SE = places[:, None] * (1.0 / theta**exponents)
            self.cos_of_axes.append(angles_SE.cos().float())
            self.sin_of_axes.append(angles_SE.sin().float())

    def __call__(self, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N,E) cosines and (N,E) sines, N = frames * height * width."""
        sizes = (frames, height, width)
        return _grid(self.cos_of_axes, sizes, device), _grid(self.sin_of_axes, sizes, device)


def _grid(tables: list[Tensor], sizes: tuple[int, int, int], device: torch.device) -> Tensor:
    """The rows of one table per axis, side by side for every token."""
    parts = []
    for axis, table in enumerate(tables):
        # An index, not a slice: torch.export would bound a slice by the table's length.
        rows = table.to(device)[torch.arange(sizes[axis], device=device)]
        shape = [1, 1, 1, rows.shape[1]]
        shape[axis] = sizes[axis]
        parts.append(rows.reshape(shape).expand(*sizes, -1))
    return torch.cat(parts, dim=3).flatten(0, 2)
