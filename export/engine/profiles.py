"""Optimisation profiles of an engine: one per orientation of the picture, so that workspace fits real sizes.

With resolution bins, a bundle has short and long sides, for example 512 to 2048 px at 1K, but no bin is long on both.
One profile over both ranges would plan workspace for four times the pixels of any picture. One profile for landscape
and one for portrait plan for at most two times. `tensorrt`, which chooses kernels while it builds, gets a third profile
for the default size. TensorRT-RTX does not need it: it specialises its kernels to the shapes it meets (its runtime
configuration's `dynamic_shapes_kernel_specialization_strategy`), and each further profile takes as long as the first.
"""

from __future__ import annotations

from dataclasses import replace

from ditc.runtime.bundle.manifest import Defaults
from ditc.runtime.sessions.registry import row_of
from ditc.runtime.spec import VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER, Backend, Range, StageSpec
from ditc.runtime.step_contract import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH

_SIDES = ((HEIGHT, WIDTH), (IMAGE_HEIGHT, IMAGE_WIDTH))


def orientation_profiles(
    spec: StageSpec, defaults: Defaults, backend: Backend
) -> tuple[dict[str, Range], ...]:
    """One mapping per profile, with the ranges that differ from spec.profile.

    One empty mapping means that one profile is enough. That holds for stages that run on tiles, because tiles are
    small on both sides and have no orientation.
    """
    named = [sides for sides in _SIDES if sides[0] in spec.profile]
    tiles = defaults.tiling is not None and spec.name in (VAE_DECODER, VAE_DECODER_NEXT, VAE_ENCODER)
    if not defaults.bins or not named or tiles:
        return ({},)
    ((height, width),) = named
    tall, wide = spec.profile[height], spec.profile[width]
    default = ({height: _exactly(tall), width: _exactly(wide)},) if row_of(backend).built_on_gpu else ()
    return (
        *default,
        {height: replace(tall, max=tall.opt), width: replace(wide, min=wide.opt)},
        {height: replace(tall, min=tall.opt), width: replace(wide, max=wide.opt)},
    )


def _exactly(size: Range) -> Range:
    return replace(size, min=size.opt, max=size.opt)
