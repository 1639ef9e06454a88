"""Picture sizes: the trained size that is nearest to a request, and the sizes that a denoiser was built for."""

from __future__ import annotations

from collections.abc import Sequence

from ditc.runtime.bundle.manifest import Defaults, LatentSpec
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import Range, StageSpec
from ditc.runtime.step_contract import HEIGHT, WIDTH


def classify(height: int, width: int, bins: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of the bin with the nearest aspect ratio, or the size itself if there are no bins.

    The ratios of bins are rounded to two decimals, and of two equally near bins the first is taken. This is what
    diffusers' classify_height_width_bin (0.42.1) does, because its tables have these ratios as keys.
    """
    if not bins:
        return height, width
    ratio = height / width
    return min(bins, key=lambda size: abs(round(size[0] / size[1], 2) - ratio))


def size_like(height: int, width: int, defaults: Defaults) -> tuple[int, int]:
    """The (height, width) to draw a picture in that replaces one of height x width: the bin of its shape.

    Without bins it is the bundle's default. diffusers' pipelines draw every image at the default size, which squeezes
    it; so this is for callers that ask nobody for a size, such as the command line.
    """
    return classify(height, width, defaults.bins) if defaults.bins else (defaults.height, defaults.width)


def check_size(height: int, width: int, latents: LatentSpec, spec: StageSpec, defaults: Defaults) -> None:
    """Refuse a picture size that the denoiser was not built for.

    Raises:
        UsageError: the message names the size, the step and the range, and the hint the nearest size that works.
    """
    for name, dimension, value in (("height", HEIGHT, height), ("width", WIDTH, width)):
        cells = spec.profile[dimension]
        allowed = Range(
            *(n * latents.scale_factor for n in (cells.min, cells.opt, cells.max, cells.multiple_of))
        )
        if value not in allowed:
            nearest = min(
                max(round(value / allowed.multiple_of) * allowed.multiple_of, allowed.min), allowed.max
            )
            raise UsageError(
                f"{name} {value} is not a multiple of {allowed.multiple_of} "
                f"from {allowed.min} to {allowed.max}, which this bundle was built for",
                hint=f"use {name} {nearest}; the default is {defaults.height}x{defaults.width}",
            )
