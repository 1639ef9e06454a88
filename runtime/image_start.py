"""Image-to-image and inpainting: where a request with a picture starts, and what stays of the picture in every step.

The semantics are those of diffusers' image-to-image and inpainting pipelines of flow models (0.42.1), for every
sampler: latents at a noise level are  signal * image + noise_level * noise.
"""

# B pictures of a request, I images, C latent channels, H/W pixels, h/w latent cells

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.errors import NumericsError
from ditc.runtime.image_input import GivenImages
from ditc.runtime.noise import Parts, noise_parts
from ditc.runtime.rng import Generator
from ditc.runtime.session import Array, Session, to_numpy
from ditc.runtime.step_contract import LATENTS, LATENTS_STD
from ditc.runtime.vae import encode_tiled

IMAGE = "image"  # the encoder's input


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept:
    """What inpainting puts back after every step: outside the mask, the image at the noise level that was reached.

    Attributes:
        mask: (B,1,h,w), 1 where the picture is drawn anew, 0 where the image stays.
        image_latents, noise: (B,C,h,w) fp32.
        levels: (N + 1, 2), the weights of image and noise before each run of the network and at the end.
    """

    mask: Array
    image_latents: Array
    noise: Array
    levels: Array

    def put_back(self, latents: Array, runs_done: int) -> Array:
        """The latents after `runs_done` runs, with the image outside of the mask: without noise after the last run."""
        signal, level = self.levels[runs_done]
        if runs_done == len(self.levels) - 1:  # the image alone, in the units of the sampler's latents
            signal, level = signal + level, np.float32(0)
        return self._outside(signal * self.image_latents + level * self.noise, latents)

    def put_back_x0(self, x0: Array) -> Array:
        """The last x0, which a decoder takes, with the image outside of the mask."""
        return self._outside(self.image_latents, x0)

    def _outside(self, kept: Array, drawn: Array) -> Array:
        return np.asarray((1 - self.mask) * kept + self.mask * drawn, np.float32)


class ImageLatents:
    """The latents of a request's images, in the order of its pictures.

    An image is encoded when its first picture is drawn. Only the last one that was encoded is kept.

    Args:
        encoder: the vae_encoder. If it also returns `latents_std`, a sample of the posterior is drawn, as in diffusers:
            mean + std * noise, with noise that is drawn before all other noise of the request.
        generator: of that noise; None takes the mean.
        images: one for all pictures, or one per prompt.
        shape: (B,C,h,w) of all pictures of the request, or (B,C,F,h,w) of videos.
        per_prompt: num_images_per_prompt.
    """

    def __init__(
        self,
        encoder: Session,
        images: GivenImages,
        shape: Sequence[int],
        generator: Generator | Sequence[Generator] | None,
        *,
        per_prompt: int,
        scale: int,
        tiling: Tiling | None,
    ) -> None:
        self._encoder, self._images, self._per_prompt = encoder, images, per_prompt
        self._scale, self._tiling = scale, tiling
        self._size = (shape[-2] * scale, shape[-1] * scale)
        self._taken = 0
        self._encoded: tuple[int, Array, Array | None] | None = None
        self._sampled: tuple[int, Array] | None = None
        self._noise: Parts | None = None
        self._for_each_picture = not isinstance(generator, Generator)
        if generator is not None and any(out.name == LATENTS_STD for out in encoder.spec.outputs):
            count = shape[0] if self._for_each_picture else len(images)
            self._noise = noise_parts((count, *shape[1:]), generator)

    def take(self, count: int) -> Array:
        """The latents (count,C,h,w) of the images of the next pictures.

        Raises:
            NumericsError: the encoder returned NaN or Inf.
        """
        pictures = range(self._taken, self._taken + count)
        self._taken += count
        return np.concatenate([self._of_picture(picture) for picture in pictures])

    def _of_picture(self, picture: int) -> Array:
        image = picture // self._per_prompt if len(self._images) > 1 else 0
        if self._encoded is None or self._encoded[0] != image:
            self._encoded = (image, *self._encode(image))
            self._sampled = None
        _, mode, std = self._encoded
        if std is None or self._noise is None:
            return mode
        key = picture if self._for_each_picture else image
        if self._sampled is None or self._sampled[0] != key:
            self._sampled = (key, mode + std * self._noise.take(1))
        return self._sampled[1]

    def _encode(self, image: int) -> tuple[Array, Array | None]:
        pixels = self._images.picture(image, *self._size)
        outputs: list[Array | None] = []
        for name in (LATENTS, LATENTS_STD):
            if all(output.name != name for output in self._encoder.spec.outputs):
                outputs.append(None)
                continue
            found = self._run(pixels, name)
            if not np.isfinite(found).all():
                raise NumericsError(
                    f"vae_encoder returned NaN or Inf for image {image}",
                    hint="build the VAE in bf16 or fp32: its activations exceed fp16's range on some checkpoints",
                )
            outputs.append(found)
        assert outputs[0] is not None
        return outputs[0], outputs[1]

    def _run(self, pixels: Array, name: str) -> Array:
        def encode(part: Array) -> Array:
            return np.array(to_numpy(self._encoder.run({IMAGE: part})[name]))

        if self._tiling is None:
            return encode(pixels)
        return encode_tiled(
            encode, pixels, tile=self._tiling.tile, stride=self._tiling.stride, scale=self._scale
        )


def cell_mask(masks: GivenImages, index: int, size: tuple[int, int], scale: int) -> Array:
    """One mask in latent cells (1,1,h,w): that of the first pixel of each cell, as torch's nearest interpolation takes.

    Args:
        size: (height, width) of the picture, in pixels.
    """
    return np.ascontiguousarray(masks.mask(index, *size)[:, :, ::scale, ::scale])
