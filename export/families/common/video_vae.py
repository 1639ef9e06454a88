"""The stages of a video's autoencoder: the first latent frame, every later one, and the encoder of a first frame.

An autoencoder that is not causal in time has one stage for both, which decodes a whole video.

The networks keep frames (B,D,T,s*H,s*W) from chunk to chunk. A stage's dimensions have names without factors, so it
takes and gives them as (B,D,T,H,s,W,s), which are the same values in the same order.
"""

# B batch, C latent channels, H/W latent size, D kept channels, T frames, s pixels of a kept frame per latent cell

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ditc.export.families.common.specs import IN_PIXELS, tiled_ranges
from ditc.export.networks.wan_vae import KeptFrames
from ditc.runtime.bundle.manifest import LatentSpec, Tiling
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER, DType, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import (
    BATCH,
    FRAMES,
    HEIGHT,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    KEPT,
    LATENTS,
    NEXT_KEPT,
    VIDEO_FRAMES,
    WIDTH,
)


def video_vae_specs(
    latents: LatentSpec,
    sizes: Mapping[str, Range],
    kept: Sequence[KeptFrames],
    *,
    dtype: DType,
    max_batch: int,
    tiling: Tiling | None = None,
) -> dict[str, StageSpec]:
    """Specs of the two stages of the decoder, and of the encoder, which takes one picture: a video's first frame.

    Args:
        sizes: ranges of the latent height and width in cells, among others.
        kept: what the decoder keeps, in order.
        dtype: the element type of what it keeps.
        tiling: how large frames are decoded; the largest input is then one tile.
    """
    scale, channels = latents.scale_factor, latents.channels
    cells = tiled_ranges({name: sizes[name] for name in (HEIGHT, WIDTH)}, tiling, latents)
    pixels = {
        IN_PIXELS[name]: Range(r.min * scale, r.opt * scale, r.max * scale, scale)
        for name, r in cells.items()
    }
    batch = {BATCH: Range(1, 1, max_batch)}
    latent = TensorSpec(LATENTS, DType.FLOAT32, (BATCH, channels, 1, HEIGHT, WIDTH))

    def frames(count: int) -> TensorSpec:
        return TensorSpec("frames", DType.FLOAT32, (BATCH, 3, count, IMAGE_HEIGHT, IMAGE_WIDTH))

    def handed_on(prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                f"{prefix}{index}", dtype, (BATCH, k.channels, k.frames, HEIGHT, k.scale, WIDTH, k.scale)
            )
            for index, k in enumerate(kept)
        )

    return {
        VAE_DECODER: StageSpec(VAE_DECODER, (latent,), (frames(1), *handed_on(KEPT)), {**batch, **cells}),
        VAE_DECODER_NEXT: StageSpec(
            VAE_DECODER_NEXT,
            (latent, *handed_on(KEPT)),
            (frames(latents.frames_per_cell or 1), *handed_on(NEXT_KEPT)),
            {**batch, **cells},
        ),
        VAE_ENCODER: StageSpec(
            VAE_ENCODER,
            (TensorSpec("image", DType.FLOAT32, (BATCH, 3, IMAGE_HEIGHT, IMAGE_WIDTH)),),
            (TensorSpec(LATENTS, DType.FLOAT32, (BATCH, channels, HEIGHT, WIDTH)),),
            {**batch, **pixels},
        ),
    }


def whole_video_vae_specs(
    latents: LatentSpec, sizes: Mapping[str, Range], *, smallest: int, max_batch: int
) -> dict[str, StageSpec]:
    """Specs of a decoder that takes all latent frames of a video, and of the encoder, which takes one picture.

    Args:
        sizes: ranges of the latent frames, height and width in cells.
        smallest: the smallest height and width, in cells, that the decoder takes.
    """
    scale = latents.scale_factor
    cells = {
        name: Range(max(smallest, sizes[name].min), sizes[name].opt, sizes[name].max)
        for name in (HEIGHT, WIDTH)
    }
    pixels = {
        IN_PIXELS[name]: Range(r.min * scale, r.opt * scale, r.max * scale, scale)
        for name, r in cells.items()
    }
    batch = {BATCH: Range(1, 1, max_batch)}
    whole = TensorSpec(LATENTS, DType.FLOAT32, (BATCH, latents.channels, FRAMES, HEIGHT, WIDTH))
    frames = TensorSpec("frames", DType.FLOAT32, (BATCH, 3, VIDEO_FRAMES, IMAGE_HEIGHT, IMAGE_WIDTH))
    picture = TensorSpec("image", DType.FLOAT32, (BATCH, 3, IMAGE_HEIGHT, IMAGE_WIDTH))
    encoded = TensorSpec(LATENTS, DType.FLOAT32, (BATCH, latents.channels, HEIGHT, WIDTH))
    profile = {**batch, FRAMES: sizes[FRAMES], **cells}
    return {
        VAE_DECODER: StageSpec(VAE_DECODER, (whole,), (frames,), profile),
        VAE_ENCODER: StageSpec(VAE_ENCODER, (picture,), (encoded,), {**batch, **pixels}),
    }


class FirstChunkDecoder(nn.Module):
    """A decoder as the stage of the first latent frame."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        frames, *left = self.network(latents)
        return frames, *(_in_cells(x, latents) for x in left)


class NextChunkDecoder(nn.Module):
    """A decoder as the stage of a later latent frame."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        frames, *left = self.network(latents, *(x.flatten(3, 4).flatten(4, 5) for x in kept))
        return frames, *(_in_cells(x, latents) for x in left)


class FirstFrameEncoder(nn.Module):
    """An encoder of videos as a stage that takes pictures (B,3,H,W): each is the first frame of a video."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        latents: Tensor = self.network(image[:, :, None])[0]
        return latents[:, :, 0]


def _in_cells(x: Tensor, latents: Tensor) -> Tensor:
    """(B,D,T,s*H,s*W) as (B,D,T,H,s,W,s), where H and W are those of the latents."""
    batch, channels, frames, rows, columns = x.shape
    height, width = latents.shape[3], latents.shape[4]
    return x.reshape(batch, channels, frames, height, rows // height, width, columns // width)
