"""What a drawn request returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ditc.runtime.failure import Failure
from ditc.runtime.prepare import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The pictures that were drawn together: as many as the denoiser's batch holds.

    Attributes:
        first: the index of the first one among the request's pictures.
        pictures: PIL images, floats (1,H,W,3) in [0,1] or latents (1,C,h,w), as output_type says; None for a picture
            that failed.
        failures: why those that are None failed.
        seconds: the time for each part of the work: text, denoise, decode.
    """

    first: int
    pictures: list[Any]
    failures: tuple[Failure, ...]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Pictures, and how they were made.

    Attributes:
        images: a list of PIL images, floats (B,H,W,3) in [0,1], or latents (B,C,h,w), as output_type says. In the place
            of a picture that failed is None, or an array of NaN. Of a bundle that draws videos, they are the same as
            `frames`.
        seed: the seed of the starting noise, even if it was chosen at random. None if the caller gave a generator or
            latents instead of a seed.
        seconds: the time for each part of the work: text, denoise, decode.
        failures: the pictures that failed, and why. It is empty if all is well.

    Like diffusers' outputs, it has the images at index 0 and under the key "images", or videos under "frames".
    """

    images: Any
    seed: int | None
    seconds: dict[str, float]
    plan: Plan
    failures: tuple[Failure, ...] = ()

    @property
    def frames(self) -> Any:
        """The videos: for each one a list of PIL images; or floats (B,F,H,W,3) in [0,1], or latents (B,C,f,h,w).

        Raises:
            AttributeError: the bundle draws pictures.
        """
        if self.plan.frames is None:
            raise AttributeError("this bundle draws pictures: read `images`")
        return self.images

    def to_tuple(self) -> tuple[Any]:
        """What diffusers returns with return_dict=False."""
        return (self.images,)

    def __getitem__(self, key: int | slice | str) -> Any:
        name = "images" if self.plan.frames is None else "frames"
        return {name: self.images}[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())
