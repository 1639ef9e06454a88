"""The resolution bins of PixArt and Sana, read from diffusers: (height, width) in pixels."""

from __future__ import annotations


def resolution_bins(size: int) -> tuple[tuple[int, int], ...]:
    """The bins of models trained at `size` x `size` pixels: 512, 1024, 2048 or 4096. Empty for every other size.

    SanaPipeline.__call__ (diffusers 0.42.1) takes them from the same tables, which it picks by the latent size.
    """
    # diffusers' pipelines are slow to import, and only this function needs them.
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
        ASPECT_RATIO_512_BIN,
        ASPECT_RATIO_1024_BIN,
    )
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    tables = {
        512: ASPECT_RATIO_512_BIN,
        1024: ASPECT_RATIO_1024_BIN,
        2048: ASPECT_RATIO_2048_BIN,
        4096: ASPECT_RATIO_4096_BIN,
    }
    return tuple((int(height), int(width)) for height, width in tables.get(size, {}).values())
