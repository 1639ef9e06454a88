"""Opens a bundle as a pipeline: every file that will be read is checked, and stages are tested at their first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ditc.runtime.bundle.certification import check_certified
from ditc.runtime.bundle.fetch import local_bundle
from ditc.runtime.bundle.selftest import first_use
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import load_parts
from ditc.runtime.lora.adapters import Adapters
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.spec import DENOISER, VAE_ENCODER

if TYPE_CHECKING:
    from ditc.runtime.pipeline import Pipeline

P = TypeVar("P", bound="Pipeline")


def opened(kind: type[P], bundle: str | Path, options: LoadOptions) -> P:
    """The pipeline of a bundle. Arguments and errors are those of `Pipeline.load`."""
    bundle = local_bundle(bundle)
    parts = load_parts(bundle, options)
    pipeline = kind(parts.manifest, parts.sessions, parts.conditioning, chosen=parts.chosen)
    pipeline.device = parts.device
    denoiser = parts.artifacts[DENOISER]
    pipeline.backend, pipeline.precision = denoiser.backend, denoiser.precision.value
    try:
        required = options.require_certificate
        tested = (
            first_use(bundle, parts.certification, parts.sessions, required=required)
            if options.self_test
            else None
        )
        pipeline.uncertified = parts.certification.why_uncertified(tested)
        if required:
            check_certified(bundle, pipeline.uncertified)
    except BaseException:
        pipeline.close()
        raise
    if parts.encoder is not None:
        pipeline.sessions[VAE_ENCODER] = parts.encoder
    reopener = Reopener(Path(bundle), parts.manifest, parts.artifacts, options, parts.device)
    pipeline.adapters = Adapters(
        reopener, pipeline.sessions, parts.conditioning, uncertified=pipeline.uncertified
    )
    return pipeline
