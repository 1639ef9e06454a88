"""Tiling, compared with AutoencoderDC.enable_tiling of diffusers on a tiny autoencoder of that class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from ditc.runtime.errors import UsageError
from ditc.runtime.vae import decode_tiled, encode_tiled, tile_sizes

SCALE = 4
# Both sides run the network on the same tiles; they differ only in one float32 rounding of a blend.
BOUND = 1e-6
CASES = [
    # tile, stride, latent height and width
    (32, 24, 20, 20),
    (32, 24, 9, 30),
    (32, 32, 17, 24),
    (32, 4, 11, 9),
    (32, 28, 8, 13),
    (48, 36, 29, 13),
    (32, 24, 8, 8),
    (32, 24, 5, 3),
]


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    channels = (8, 16, 16)
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="interpolate",
    )
    return model.eval().requires_grad_(False)


def as_numpy(network: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: network(torch.from_numpy(array)).numpy()


def enable_tiling(vae: AutoencoderDC, tile: int, stride: int) -> None:
    vae.enable_tiling(tile, tile, stride, stride)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("tile", "stride", "height", "width"), CASES)
def test_tiled_decoding_equals_diffusers(
    vae: AutoencoderDC, tile: int, stride: int, height: int, width: int
) -> None:
    enable_tiling(vae, tile, stride)
    latents = noise(2, 4, height, width)
    reference = vae.decode(latents, return_dict=False)[0].numpy()
    image = decode_tiled(as_numpy(vae.decoder), latents.numpy(), tile=tile, stride=stride, scale=SCALE)
    assert image.shape == (2, 3, SCALE * height, SCALE * width)
    np.testing.assert_allclose(image, reference, rtol=0, atol=BOUND * np.abs(reference).max())


@pytest.mark.parametrize(("tile", "stride", "height", "width"), CASES)
def test_tiled_encoding_equals_diffusers(
    vae: AutoencoderDC, tile: int, stride: int, height: int, width: int
) -> None:
    enable_tiling(vae, tile, stride)
    images = noise(1, 3, SCALE * height, SCALE * width)
    reference = vae.encode(images, return_dict=False)[0].numpy()
    latents = encode_tiled(as_numpy(vae.encoder), images.numpy(), tile=tile, stride=stride, scale=SCALE)
    assert latents.shape == (1, 4, height, width)
    np.testing.assert_allclose(latents, reference, rtol=0, atol=BOUND * np.abs(reference).max())


def test_tiling_changes_the_picture(vae: AutoencoderDC) -> None:
    """The comparisons above would prove nothing if tiling did not change the picture."""
    latents = noise(1, 4, 20, 20).numpy()
    whole = as_numpy(vae.decoder)(latents)
    tiled = decode_tiled(as_numpy(vae.decoder), latents, tile=32, stride=24, scale=SCALE)
    assert np.abs(tiled - whole).max() > 1e-3 * np.abs(whole).max()


def test_a_decoder_that_reuses_its_output_buffer_gives_the_same_picture(vae: AutoencoderDC) -> None:
    decode, latents = as_numpy(vae.decoder), noise(1, 4, 20, 20).numpy()
    buffer = np.empty((1, 3, 32, 32), np.float32)

    def reusing(tile: np.ndarray) -> np.ndarray:
        image = decode(tile)
        view = buffer[:, :, : image.shape[2], : image.shape[3]]
        view[...] = image
        return view

    expected = decode_tiled(decode, latents, tile=32, stride=24, scale=SCALE)
    np.testing.assert_array_equal(decode_tiled(reusing, latents, tile=32, stride=24, scale=SCALE), expected)


@pytest.mark.parametrize(("tile", "stride", "height", "width"), CASES)
def test_tile_sizes_are_those_that_are_decoded(tile: int, stride: int, height: int, width: int) -> None:
    seen = set()

    def decode(latents: np.ndarray) -> np.ndarray:
        seen.add(latents.shape[2:])
        return np.zeros((1, 3, SCALE * latents.shape[2], SCALE * latents.shape[3]), np.float32)

    decode_tiled(decode, np.zeros((1, 4, height, width), np.float32), tile=tile, stride=stride, scale=SCALE)
    assert seen == tile_sizes(height, width, tile=tile // SCALE, stride=stride // SCALE)


@pytest.mark.parametrize(("tile", "stride"), [(30, 24), (32, 23), (32, 0), (32, 36)])
def test_tiles_that_do_not_fit_are_refused(tile: int, stride: int) -> None:
    with pytest.raises(UsageError, match="tile"):
        decode_tiled(lambda x: x, np.zeros((1, 4, 20, 20), np.float32), tile=tile, stride=stride, scale=SCALE)


def test_a_picture_that_is_not_made_of_whole_cells_is_refused() -> None:
    with pytest.raises(UsageError, match="41x40"):
        encode_tiled(lambda x: x, np.zeros((1, 3, 41, 40), np.float32), tile=32, stride=24, scale=SCALE)
