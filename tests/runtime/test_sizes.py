"""Resolution bins, compared with those of diffusers."""

from __future__ import annotations

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.pipelines.sana import pipeline_sana

from ditc.export.families.sana.resolution_bins import resolution_bins
from ditc.runtime.sizes import classify

TABLES = {
    512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
    1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("size", TABLES)
def test_every_size_falls_into_the_bin_of_diffusers(size: int) -> None:
    bins = resolution_bins(size)
    assert len(bins) == len(TABLES[size])
    for height in range(64, 2 * size, size // 29):
        for width in range(64, 2 * size, size // 31):
            expected = PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[size])
            assert classify(height, width, bins) == expected


@pytest.mark.parametrize("size", TABLES)
def test_the_square_size_is_a_bin(size: int) -> None:
    assert classify(size, size, resolution_bins(size)) == (size, size)


def test_without_bins_the_size_stays() -> None:
    assert resolution_bins(256) == ()
    assert classify(192, 320, ()) == (192, 320)
