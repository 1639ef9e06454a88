"""Sessions that compile for sizes begin with those of a request while its texts are encoded."""

from __future__ import annotations

from ditc.runtime.prepare import Drawable, Plan
from ditc.runtime.session import CompilingSession, Session
from ditc.runtime.step_contract import BATCH, FRAMES, GUIDANCE_WEIGHTS, ROWS, TEXT_LENGTH


def compile_ahead(plan: Plan, drawable: Drawable, denoiser: Session, decoder: Session) -> None:
    """Let both sessions compile for the first pictures of a plan, if they compile and it is known for which sizes."""
    if isinstance(denoiser, CompilingSession):
        sizes, inputs = _sizes(plan, drawable), denoiser.spec.inputs
        if all(isinstance(size, int) or size in sizes for tensor in inputs for size in tensor.shape):
            denoiser.compile_ahead(
                {t.name: tuple(s if isinstance(s, int) else sizes[s] for s in t.shape) for t in inputs}
            )
    tiling, sides = drawable.tiling, (plan.drawn_height, plan.drawn_width)
    whole = tiling is None or max(sides) <= tiling.tile
    if isinstance(decoder, CompilingSession) and whole and plan.request.output_type != "latent":
        frames = plan.frames
        if frames is not None and FRAMES not in decoder.spec.profile:
            frames = 1  # it decodes the first latent frame alone
        latents = drawable.manifest.latents.shape(*sides, frames)
        decoder.compile_ahead({decoder.spec.inputs[0].name: (1, *latents)})


def _sizes(plan: Plan, drawable: Drawable) -> dict[str, int]:
    """The named dimensions of the denoiser's first run, without the length of the text if it is known only later."""
    latents, samples = drawable.manifest.latents, min(plan.at_once, plan.pictures)
    (first, *_) = plan.guidance_feeds(drawable.contract, samples)
    cells = latents.shape(plan.drawn_height, plan.drawn_width, plan.frames)[1:]
    sizes = {
        BATCH: samples,
        ROWS: first[GUIDANCE_WEIGHTS].shape[1],
        **dict(zip(latents.axes, cells, strict=True)),
    }
    if (tokens := drawable.denoiser.profile.get(TEXT_LENGTH)) is not None:
        request = plan.request
        if tokens.varies or (request.max_sequence_length is None and not request.embeds(negative=False)):
            sizes[TEXT_LENGTH] = tokens.opt  # that of all texts, or one that stays open
    return sizes
