"""Tiled decoding and encoding: a VAE computes large pictures in overlapping tiles, whose seams are blended.

The result is that of diffusers' autoencoders after enable_tiling (tiled_decode, tiled_encode, 0.42.1) with the same
tile and stride. Only one row of tiles is in memory at a time, instead of all of them.
"""

# B pictures, C channels, h/w in latent cells, H/W in pixels

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import UsageError
from ditc.runtime.session import Array
from ditc.runtime.spec import StageSpec
from ditc.runtime.step_contract import FRAMES, HEIGHT, WIDTH

Span = tuple[int, int]


def decode_tiled(
    decode: Callable[[Array], Array], latents: Array, *, tile: int, stride: int, scale: int
) -> Array:
    """Decode latents (B,C,h,w) to (B,3,H,W) tile by tile, or in one piece if the picture fits into one tile.

    Args:
        tile: side of a tile in pixels (diffusers: tile_sample_min_height and _width).
        stride: distance between two tiles in pixels. Neighbours are blended over tile - stride pixels.
        scale: pixels per latent cell.

    Raises:
        UsageError: tile or stride are not a whole number of cells, or the stride is longer than the tile.
    """
    check_tiling(tile, stride, scale)
    if max(latents.shape[2:]) <= tile // scale:
        return decode(latents)
    return _blend_tiles(
        decode, latents, tile=tile // scale, stride=stride // scale, out_tile=tile, out_stride=stride
    )


def encode_tiled(
    encode: Callable[[Array], Array], images: Array, *, tile: int, stride: int, scale: int
) -> Array:
    """Encode pictures (B,3,H,W) to latents (B,C,h,w) tile by tile. The arguments are those of decode_tiled.

    Raises:
        UsageError: as in decode_tiled, or the sides of the picture are not multiples of `scale`.
    """
    check_tiling(tile, stride, scale)
    if images.shape[2] % scale or images.shape[3] % scale:
        raise UsageError(
            f"the picture is {images.shape[2]}x{images.shape[3]}, which is not a whole number of {scale}x{scale} cells",
            hint=f"resize it to multiples of {scale}",
        )
    if max(images.shape[2:]) <= tile:
        return encode(images)
    return _blend_tiles(
        encode, images, tile=tile, stride=stride, out_tile=tile // scale, out_stride=stride // scale
    )


def check_tiling(tile: int, stride: int, scale: int) -> None:
    """Raise UsageError for a tile or stride that decode_tiled cannot use."""
    if tile % scale or stride % scale or not 0 < stride <= tile:
        raise UsageError(
            f"tile {tile} and stride {stride} do not fit cells of {scale} pixels",
            hint=f"use multiples of {scale} with 0 < stride <= tile",
        )


def check_tiles(
    height: int, width: int, spec: StageSpec, tiling: Tiling | None, *, scale: int, default: Tiling | None
) -> None:
    """Check that the decoder was built for the tiles of a picture, or for the whole picture, before any step.

    Args:
        height, width: size of the latents, in cells.
        tiling: None decodes in one piece.
        scale: pixels per latent cell.
        default: the bundle's own tiling, which always fits.

    Raises:
        UsageError: the decoder was not built for them, or takes videos as a whole. The message names the sizes, and the
            hint a tiling that works.
    """
    if tiling is not None and FRAMES in spec.profile:
        raise UsageError(
            f"tiling is {tiling.tile} every {tiling.stride} pixels, but {spec.name} decodes a video as a whole",
            hint='set pipeline.tiling = None, and leave "tiling" out of the checkpoint\'s ditc.json',
        )
    sizes = {(height, width)}
    if tiling is not None:
        check_tiling(tiling.tile, tiling.stride, scale)
        sizes = tile_sizes(height, width, tile=tiling.tile // scale, stride=tiling.stride // scale)
    rows, columns = spec.profile[HEIGHT], spec.profile[WIDTH]
    wrong = sorted(size for size in sizes if size[0] not in rows or size[1] not in columns)
    if not wrong:
        return
    how = "in one piece" if tiling is None else f"in tiles of {tiling.tile} every {tiling.stride} pixels"
    found = ", ".join(f"{h * scale}x{w * scale}" for h, w in wrong)
    raise UsageError(
        f"a picture of {height * scale}x{width * scale} decoded {how} has pieces of {found}; {spec.name} was built for "
        f"{rows.min * scale} to {rows.max * scale} by {columns.min * scale} to {columns.max * scale} pixels",
        hint="set pipeline.tiling = "
        + ("None: this decoder takes whole pictures" if default is None else f"{default}, the bundle's own"),
    )


def tile_sizes(height: int, width: int, *, tile: int, stride: int) -> set[tuple[int, int]]:
    """The sizes of the tiles that height x width is cut into. Tiles of the last row and column may be smaller.

    All arguments are in the same unit, pixels or cells.
    """
    if max(height, width) <= tile:
        return {(height, width)}
    rows, columns = _spans(height, tile, stride), _spans(width, tile, stride)
    return {(bottom - top, right - left) for top, bottom in rows for left, right in columns}


def _spans(length: int, tile: int, stride: int) -> list[Span]:
    return [(start, min(start + tile, length)) for start in range(0, length, stride)]


def _blend_tiles(
    run: Callable[[Array], Array], source: Array, *, tile: int, stride: int, out_tile: int, out_stride: int
) -> Array:
    overlap = out_tile - out_stride
    rows: list[Array] = []
    above: list[Array] = []
    for top, bottom in _spans(source.shape[2], tile, stride):
        strip = source[:, :, top:bottom]
        row = list(_blended_row(run, strip, above, tile=tile, stride=stride, overlap=overlap))
        rows.append(np.concatenate([piece[:, :, :out_stride, :out_stride] for piece in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


def _blended_row(
    run: Callable[[Array], Array], strip: Array, above: list[Array], *, tile: int, stride: int, overlap: int
) -> Iterator[Array]:
    """The tiles of one row, each blended with its neighbours above and left, which are already blended."""
    left: Array | None = None
    for column, (start, stop) in enumerate(_spans(strip.shape[3], tile, stride)):
        # Copied, because the result of a session may be a buffer that its next run overwrites.
        piece = np.array(run(np.ascontiguousarray(strip[:, :, :, start:stop])))
        if above:
            _blend(above[column], piece, overlap, axis=2)
        if left is not None:
            _blend(left, piece, overlap, axis=3)
        yield piece
        left = piece


def _blend(before: Array, piece: Array, overlap: int, axis: int) -> None:
    """Fade in place from the end of `before` to the start of `piece` (diffusers' blend_v, blend_h)."""
    extent = min(before.shape[axis], piece.shape[axis], overlap)
    if extent == 0:
        return
    shape = [1] * piece.ndim
    shape[axis] = extent
    # Quotients of two integers, rounded once to the picture's type, as torch rounds a Python scalar.
    fade: NDArray[np.float64] = np.arange(extent) / extent
    fade_in, fade_out = (w.astype(piece.dtype).reshape(shape) for w in (fade, 1 - fade))
    end = before.take(range(before.shape[axis] - extent, before.shape[axis]), axis)
    start = (slice(None),) * axis + (slice(extent),)
    piece[start] = end * fade_out + piece[start] * fade_in
