"""The resolution bins of PixArt, Sana and SANA-Video, read from diffusers: (height, width) in pixels."""

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


def video_bins(sample_size: int) -> tuple[tuple[int, int], ...]:
    """The bins of SANA-Video, of which SanaVideoPipeline.__call__ (diffusers 0.42.1) picks one table by the
    transformer's sample_size: 30 for 480p, 22 for 720p. Empty for every other one, which the pipeline refuses.
    """
    from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN, ASPECT_RATIO_720_BIN

    tables = {30: ASPECT_RATIO_480_BIN, 22: ASPECT_RATIO_720_BIN}
    return tuple((int(height), int(width)) for height, width in tables.get(sample_size, {}).values())
