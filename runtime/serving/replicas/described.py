"""A bundle as the front knows it: manifest, specs and tokenizers, but no open session. It checks and plans requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ditc.runtime.bundle.integrity import check_files
from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.conditioning import Conditioning
from ditc.runtime.errors import SessionError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.replicas.messages import Opened
from ditc.runtime.session import ComputeDevice, Tensor
from ditc.runtime.spec import CONDITIONER, StageSpec
from ditc.runtime.text import Tokenizer
from ditc.runtime.text_encoder import TextEncoder


class ElsewhereSession:
    """Stands for a session that a replica holds."""

    def __init__(self, spec: StageSpec, device: ComputeDevice) -> None:
        self.spec, self.device = spec, device

    def run(self, feeds: Mapping[str, Tensor]) -> NoReturn:
        """Raise SessionError: nothing is computed here."""
        raise SessionError(f"{self.spec.name} runs in the replicas", hint="submit the request to them")

    def close(self) -> None:
        """There is nothing to close."""


class DescribedPipeline(Pipeline):
    """Plans as the pipeline of the replicas, and cannot draw."""

    loras: Sequence[dict[str, object]] = ()

    def loras_in_weights(self) -> list[dict[str, object]]:
        """What the replicas have added to their weights."""
        return list(self.loras)


def described_pipeline(bundle: Path, manifest: Manifest, opened: Opened) -> DescribedPipeline:
    """The pipeline that a replica has opened, as the front needs it.

    Raises:
        BundleError: a tokenizer's file is damaged.
    """
    sessions = {name: ElsewhereSession(spec, device) for name, (spec, device) in opened.stages.items()}
    paths = [spec.tokenizer for spec in manifest.text]
    check_files(bundle, [ref for ref in manifest.files if ref.path in paths])
    encoders = [
        TextEncoder(spec, Tokenizer(bundle / spec.tokenizer), sessions[spec.stage]) for spec in manifest.text
    ]
    conditioning = Conditioning(encoders, sessions[CONDITIONER], key=manifest.digest)
    pipeline = DescribedPipeline(manifest, sessions, conditioning, chosen=opened.chosen)
    pipeline.backend, pipeline.precision = opened.backend, opened.precision
    pipeline.uncertified, pipeline.loras = opened.uncertified, opened.loras
    return pipeline
