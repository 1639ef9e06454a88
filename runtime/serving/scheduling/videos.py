"""A video is decoded one latent frame at a time, so that steps of others, and its end, can come in between.

A decoder that is not causal in time decodes all of them at once.
"""

from __future__ import annotations

from PIL import Image

from ditc.runtime.images import is_uniform, to_pil, to_uint8
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.scheduling.job import Frames
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT
from ditc.runtime.state import DenoiseState
from ditc.runtime.video import sized_chunks


class VideoDecoding:
    """The decoding of one video, between two latent frames.

    Args:
        pipeline: whose sessions decode it. What they keep from one latent frame for the next goes with them.
        state: of one finished sample.

    Attributes:
        uniform: whether each frame so far has one colour only.
    """

    def __init__(self, pipeline: Pipeline, state: DenoiseState, plan: Plan) -> None:
        self.pipeline, self.uniform = pipeline, True
        self._frames: list[Image.Image] = []
        following = pipeline.sessions.get(VAE_DECODER_NEXT)
        self._whole = following is None
        self._left = 1 if following is None else int(state.result.shape[2])
        self._chunks = sized_chunks(
            pipeline.sessions[VAE_DECODER],
            following,
            state.result,
            height=plan.height,
            width=plan.width,
            tiling=pipeline.tiling,
            scale=pipeline.manifest.latents.scale_factor,
        )

    @property
    def done(self) -> bool:
        """Whether the whole video is decoded."""
        return self._left == 0

    @property
    def frames(self) -> Frames:
        """The frames so far."""
        return tuple(self._frames)

    def advance(self) -> int:
        """Decode the next latent frame, or the whole video. Returns the number of new frames.

        Raises:
            NumericsError: the decoder returned NaN or Inf.
        """
        before = len(self._frames)
        for decoded in self._chunks if self._whole else (next(self._chunks),):
            chunk = to_uint8(decoded)
            self.uniform = self.uniform and all(is_uniform(frame) for frame in chunk)
            self._frames += to_pil(chunk)
        self._left -= 1
        return len(self._frames) - before
