"""What a bundle says of itself: `manifest.json`, read strictly and written once.

bundle/
  manifest.json       this page; immutable after a build, carries its own digest
  certificate.json    results of parity, one entry per artifact set and machine
  onnx/ engines/      one folder a kind of artifact
  tokenizer/          tokenizer.json files
  golden/             inputs and fp32 outputs of each stage, for a self-test on the target
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import Mismatch, from_json, to_json
from ditc.runtime.errors import BundleError
from ditc.runtime.schedulers import SchedulerParams
from ditc.runtime.spec import Backend, Precision, StageSpec
from ditc.runtime.step_contract import GuidanceMode, StepContract
from ditc.runtime.text import TextSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of the bundle: path relative to it (POSIX), hash and size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One executable form of a stage.

    Attributes:
        spec: what this form takes and gives; forms of one stage differ in element types and in profile only.
        file: the ONNX graph or the engine. data: external weights that the file refers to.
        targets: SMs an engine was built for ("sm89"); empty for ONNX.
        key: hash of everything the artifact was made from.
        weights: the weight map of the graph: checkpoint tensor -> stage, initializer, transforms, as JSON.
        recipe: name of the quantization recipe, for int8 and fp8. quantization: its record, as JSON.
        library: version of the library that built an engine. gpu: name of the GPU it was built on, if on one.
    """

    spec: StageSpec
    precision: Precision
    backend: Backend
    file: FileRef
    key: str
    targets: tuple[str, ...] = ()
    data: tuple[FileRef, ...] = ()
    weights: FileRef | None = None
    recipe: str | None = None
    quantization: FileRef | None = None
    library: str | None = None
    gpu: str | None = None

    @property
    def files(self) -> tuple[FileRef, ...]:
        return (self.file, *self.data, *(ref for ref in (self.weights, self.quantization) if ref))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage and the artifacts that execute it."""

    artifacts: tuple[Artifact, ...]
    golden: FileRef | None = None


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent channels, pixels per latent cell, and the cells a network's patch takes.

    rgb is a (3, C+1) matrix (last column the bias) fitted at build, for previews in [-1, 1].
    """

    channels: int
    scale_factor: int
    patch_size: int = 1
    rgb: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Default tile and stride of tiled decoding, in pixels."""

    tile: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayerGuidance:
    """Guidance away from a network with some layers left out; names are diffusers'.

    Attributes:
        layers: those that the denoiser's gate skips; fixed in the graph.
        scale: 0 leaves it off. start, stop: the window, as fractions of the steps.
    """

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Inference defaults: sizes in pixels; bins as (height, width) pairs, empty for none.

    skip_layer_guidance is None where the denoiser cannot skip layers.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    bins: tuple[tuple[int, int], ...] = ()
    tiling: Tiling | None = None
    skip_layer_guidance: SkipLayerGuidance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenTable:
    """The coefficient table at build time: a runtime that computes another one must not run the bundle."""

    num_inference_steps: int
    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of manifest.json.

    Attributes:
        family: a label for people; no code reads it.
        guidance: how guidance_scale reaches the denoiser. Bundles from before this field was there all use CFG.
    """

    schema_version: int
    family: str
    checkpoint: str
    stages: dict[str, Stage]
    text: tuple[TextSpec, ...]
    scheduler: SchedulerParams
    latents: LatentSpec
    defaults: Defaults
    golden_table: GoldenTable
    files: tuple[FileRef, ...]
    tools: dict[str, str]
    guidance: GuidanceMode = GuidanceMode.CFG
    digest: str = ""

    def step_contract(self, denoiser: StageSpec) -> StepContract:
        """What the step of this bundle's denoiser takes, of the form that runs here."""
        return StepContract.of(denoiser, self.guidance)

    def all_files(self) -> Iterator[FileRef]:
        """Every file that the bundle owns besides the manifest and the certificate, each once."""
        seen: set[str] = set()
        artifacts = (a for stage in self.stages.values() for a in stage.artifacts)
        golden = (stage.golden for stage in self.stages.values() if stage.golden)
        for ref in (*self.files, *golden, *(ref for a in artifacts for ref in a.files)):
            if ref.path not in seen:
                seen.add(ref.path)
                yield ref


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with the digest of its own content."""
    return replace(manifest, digest=_digest(to_json(replace(manifest, digest=""))))


def save_manifest(manifest: Manifest, bundle: Path) -> Path:
    """Seal the manifest and write manifest.json as a whole."""
    return write_atomic(bundle / MANIFEST, _written(to_json(sealed(manifest))))


def load_manifest(bundle: Path) -> Manifest:
    """Read and check manifest.json: form, schema version, digest, and that no path leaves the bundle.

    Raises:
        BundleError: with what is wrong, by field, and what to do.
    """
    path = bundle / MANIFEST
    rebuild = f"rebuild with: ditc build CHECKPOINT -o {bundle}"
    if not path.is_file():
        hint = "name the bundle's directory" if bundle.is_file() else rebuild
        raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST}", hint=hint)
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path} is not JSON: {e}", hint=rebuild) from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}, this ditc reads {SCHEMA_VERSION}",
            hint="update ditc" if isinstance(version, int) and version > SCHEMA_VERSION else rebuild,
        )
    if data.get("digest") != _digest({**data, "digest": ""}):
        raise BundleError(
            f"{path} was changed after the build: its digest does not fit its content", hint=rebuild
        )
    if _written(data) != content:  # the digest is of values; a changed space would pass it
        raise BundleError(f"{path} was changed after the build: ditc writes it otherwise", hint=rebuild)
    try:
        manifest = from_json(Manifest, data)
    except Mismatch as e:
        raise BundleError(f"{path}: {e}", hint=rebuild) from e
    for ref in manifest.all_files():
        check_inside(ref.path)
    _check_tokenizers(manifest, path)
    return manifest


def _check_tokenizers(manifest: Manifest, path: Path) -> None:
    """A tokenizer is opened by its path in `text`: it must be one of the files whose hash is known."""
    listed = {ref.path for ref in manifest.files}
    for spec in manifest.text:
        if spec.tokenizer not in listed:
            raise BundleError(
                f"{path}: tokenizer {spec.tokenizer!r} is not among the bundle's files", hint="do not use it"
            )


def check_inside(path: str) -> None:
    """Raise BundleError unless a manifest's path is relative and stays inside the bundle on every platform."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise BundleError(
            f"manifest names {path!r}, which is not a plain path inside the bundle", hint="do not use it"
        )


def _written(data: object) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
