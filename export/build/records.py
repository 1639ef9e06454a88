"""What the journal stores: inputs, whose digest is a key, and records of what was made from them.

The names of the inputs' fields are the words that a user reads when one has changed: "weights changed". A record that
an earlier version of ditc wrote with other fields cannot be read, and its artifact is made again. This module does not
import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ditc.runtime.bundle.build_cost import BuildCost, artifact_record
from ditc.runtime.bundle.manifest import Artifact, FileRef
from ditc.runtime.gpu import Gpu
from ditc.runtime.spec import Backend, Precision, Range, StageSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInputs:
    """What the 8-bit layers depend on.

    Attributes:
        recipe: the recipe's digest.
        ranges: sha256 of the file of calibrated ranges; None if the recipe needs none.
    """

    recipe: str
    ranges: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """Everything that a stage's graph depends on.

    Attributes:
        weights: the sha256 of every weight file, by component and file name.
        config: the digest of each component's config, by component.
        facts: StagePlan.facts, each as JSON text.
        loras: the LoRAs in the weights: the sha256 of each file, and its scale.
        export_source: hash of the exporter's own source.
    """

    stage: str
    weights: dict[str, dict[str, str]]
    config: dict[str, str]
    facts: dict[str, str]
    shapes: StageSpec
    precision: Precision
    backend: Backend
    opset: int
    quantization: QuantizationInputs | None
    export_source: str
    tool_versions: dict[str, str]
    loras: tuple[str, ...] = ()

    @property
    def record_name(self) -> str:
        """The name in the journal."""
        return artifact_record(self.stage, self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInputs:
    """Everything that a stage's engine depends on.

    Attributes:
        graph: the key of its ONNX file.
        engine_source: hash of ditc's code that makes engines.
    """

    stage: str
    graph: str
    backend: Backend
    targets: tuple[str, ...]
    profiles: tuple[dict[str, Range], ...]
    library_version: str
    gpu: Gpu | None
    linear_attention: str
    weight_streaming: bool
    refit: bool
    engine_source: str

    @property
    def record_name(self) -> str:
        """The name in the journal."""
        return artifact_record(self.stage, self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenInputs:
    """Everything that a stage's golden file depends on.

    Attributes:
        of: the inputs that the stage's graphs of all precisions share.
        losses: the 16-bit precisions for which the file records PyTorch's own error.
    """

    of: StageInputs
    losses: tuple[str, ...]

    @property
    def record_name(self) -> str:
        """The name in the journal."""
        return f"golden-{self.of.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInputs:
    """Everything that a whole build depends on.

    Attributes:
        files: sha256 of the checkpoint's files, by path.
        options: every option as text.
        option_files: sha256 of the files that the options name, by path.
        ditc_source: hash of the exporter's and the runtime's source.
    """

    checkpoint: str
    files: dict[str, str]
    options: dict[str, str]
    option_files: dict[str, str]
    ditc_source: str
    tool_versions: dict[str, str]
    gpu: Gpu | None

    @property
    def record_name(self) -> str:
        """The name in the journal."""
        return "request"


class Inputs(Protocol):
    """Any of the inputs above."""

    @property
    def record_name(self) -> str:
        """The name in the journal."""
        ...


class Record(Protocol):
    """Any of the records below."""

    @property
    def inputs(self) -> Inputs:
        """The inputs that it was made from."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """A finished graph.

    Attributes:
        latent_rgb: the matrix that previews use (LatentSpec.rgb). Only the VAE encoder's record has one.
    """

    inputs: StageInputs
    artifact: Artifact
    cost: BuildCost
    latent_rgb: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """A finished engine."""

    inputs: EngineInputs
    artifact: Artifact
    cost: BuildCost


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRecord:
    """A finished golden file."""

    inputs: GoldenInputs
    file: FileRef


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A finished build.

    Attributes:
        manifest: the digest of its manifest.
        stages: the size of each stage's files in bytes.
    """

    inputs: RequestInputs
    manifest: str
    stages: dict[str, int]
