"""What the page's form offers for a model: read from its manifest, so that the bundle need not be open."""

from __future__ import annotations

from dataclasses import dataclass

from ditc.runtime.bundle.manifest import Defaults, Manifest
from ditc.runtime.spec import DENOISER, Range
from ditc.runtime.step_contract import HEIGHT, WIDTH, GuidanceMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The choices for one model.

    Attributes:
        sizes: the (height, width) pairs that it was trained with; empty if the sides may be chosen freely.
        height, width: the range of each side, in pixels.
        guidance: how guidance_scale reaches the denoiser.
        previews: whether the bundle can show the picture between two steps.
    """

    defaults: Defaults
    sizes: tuple[tuple[int, int], ...]
    height: Range
    width: Range
    guidance: GuidanceMode
    previews: bool

    @property
    def has_negative_prompt(self) -> bool:
        return self.guidance is GuidanceMode.CFG

    @property
    def has_guidance(self) -> bool:
        return self.guidance is not GuidanceMode.NONE


def form_of(manifest: Manifest) -> Form:
    """The form of a bundle."""
    spec, scale = manifest.stages[DENOISER].artifacts[0].spec, manifest.latents.scale_factor
    sides = {}
    for name in (HEIGHT, WIDTH):
        cells = spec.profile[name]
        sides[name] = Range(
            *(scale * count for count in (cells.min, cells.opt, cells.max, cells.multiple_of))
        )
    fits = tuple(
        size for size in manifest.defaults.bins if size[0] in sides[HEIGHT] and size[1] in sides[WIDTH]
    )
    return Form(
        defaults=manifest.defaults,
        sizes=tuple(sorted(fits, key=lambda size: size[0] / size[1])),
        height=sides[HEIGHT],
        width=sides[WIDTH],
        guidance=manifest.guidance,
        previews=bool(manifest.latents.rgb),
    )
