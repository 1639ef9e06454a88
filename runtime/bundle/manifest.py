"""manifest.json: the description of everything in a bundle. It is written once by a build and read strictly.

bundle/
  manifest.json       described here; does not change after a build, and contains its own digest
  certificate.json    results of parity and self-tests, one entry per artifact set and machine
  benchmark.json      times that ditc bench --record measured, one entry per machine and number of threads
  onnx/ engines/      the files of the artifacts, one folder per kind
  tokenizer/          tokenizer.json files
  golden/             inputs and fp32 outputs of each stage, for a self-test on the target machine
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ditc.runtime.atomic import write_atomic
from ditc.runtime.bundle.jsondata import (
    LEFT_OUT_IF_NONE,
    Mismatch,
    check_numbers,
    digest_of,
    from_json,
    serialize,
    to_json,
)
from ditc.runtime.bundle.manifest_check import check_manifest
from ditc.runtime.bundle.mistaken_path import meant
from ditc.runtime.errors import BundleError
from ditc.runtime.schedulers import SchedulerParams
from ditc.runtime.spec import Backend, Precision, StageSpec
from ditc.runtime.step_contract import PICTURE_AXES, VIDEO_AXES, GuidanceMode, StepContract
from ditc.runtime.text import TextSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# The limit of nearly every file system.
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class FileRef:
    """One file of the bundle: its path relative to the bundle, with slashes, its hash and its size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One executable form of a stage: a graph or an engine, in one precision.

    Attributes:
        spec: the inputs and outputs of this form. The forms of one stage differ only in element types and profile.
        file: the ONNX graph or the engine.
        data: external weights that the file refers to.
        targets: the compute capabilities that an engine was built for, such as "sm89"; empty for graphs.
        key: the build key, a hash of everything that the artifact was made from.
        weights: the weight map of the graph as JSON: checkpoint tensor -> stage, initializer, transforms.
        recipe: the name of the quantization recipe, for int8 and fp8.
        quantization: the record of the quantization, as JSON, for int8 and fp8.
        library: the version of the library that built an engine.
        gpu: the name of the GPU that an engine was built on, if it was built on one.
        refit: True for an engine whose weights can be replaced, so that LoRAs can be added when it is opened.
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
    refit: bool | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    @property
    def files(self) -> tuple[FileRef, ...]:
        return (self.file, *self.data, *(ref for ref in (self.weights, self.quantization) if ref))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: the artifacts that can run it, and its golden file."""

    artifacts: tuple[Artifact, ...]
    golden: FileRef | None = None


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """The form of the latents.

    Attributes:
        channels: C, the number of channels.
        scale_factor: pixels per latent cell, on each side.
        patch_size: latent cells per patch of the network, on each side.
        rgb: a (3, C+1) matrix, whose last column is the bias. It maps a latent cell to a colour in [-1, 1] for previews
            and is fitted by the build.
        frames_per_cell: frames per latent frame after the first, which is one frame; None for pictures.
    """

    channels: int
    scale_factor: int
    patch_size: int = 1
    rgb: tuple[tuple[float, ...], ...] = ()
    frames_per_cell: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the latents after batch and channels."""
        return PICTURE_AXES if self.frames_per_cell is None else VIDEO_AXES

    @property
    def has_frames(self) -> bool:
        """Whether what is drawn is a video."""
        return self.frames_per_cell is not None

    def shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """The shape (C,H,W) of one picture's latents, or (C,F,H,W) of a video's.

        Args:
            height, width: in pixels, and a whole number of cells.
            frames: of a video, one more than a multiple of frames_per_cell; None for pictures.
        """
        sides = (height // self.scale_factor, width // self.scale_factor)
        if self.frames_per_cell is None or frames is None:
            return (self.channels, *sides)
        return (self.channels, (frames - 1) // self.frames_per_cell + 1, *sides)

    def frames_of(self, latent_frames: int) -> int:
        """How many frames a video of so many latent frames has."""
        return 1 + (latent_frames - 1) * (self.frames_per_cell or 1)

    def num_patches(self, height: int, width: int) -> int:
        """How many patches the network makes of a picture, whose sides are in pixels."""
        side = self.scale_factor * self.patch_size
        return (height // side) * (width // side)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The default size of a tile and the distance between tiles in tiled decoding, in pixels."""

    tile: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayerGuidance:
    """Guidance away from what the network draws without some of its layers. The names are those of diffusers.

    Attributes:
        layers: the layers that the denoiser's gate skips. They are fixed in the graph.
        scale: the strength of the guidance; 0 turns it off.
        start, stop: the steps between which it acts, as fractions of all steps.
    """

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbedAttentionGuidance:
    """Guidance away from what the network draws with its attention perturbed (PAG, arXiv 2403.17377).

    Attributes:
        layers: the layers in which the denoiser's gate turns self-attention into the identity. They are fixed in the
            graph.
        scale: the strength of the guidance, pag_scale in diffusers; 0 turns it off.
        adaptive_scale: how much the strength falls per timestep below 1000, pag_adaptive_scale in diffusers; 0 keeps it
            constant.
    """

    layers: tuple[int, ...]
    scale: float
    adaptive_scale: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request gets if it does not ask for something else.

    Attributes:
        height, width: the size of a picture in pixels.
        bins: the (height, width) pairs in pixels that the model was trained with; empty if it has no such list.
        tiling: how large pictures are decoded; None to decode every picture in one piece.
        skip_layer_guidance: None if the denoiser cannot skip layers.
        perturbed_attention_guidance: None if the denoiser cannot perturb its attention.
        frames: the number of frames of a video; None for pictures.
        fps: how many of them are shown in a second, for files of videos; None for pictures.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    bins: tuple[tuple[int, int], ...] = ()
    tiling: Tiling | None = None
    skip_layer_guidance: SkipLayerGuidance | None = None
    perturbed_attention_guidance: PerturbedAttentionGuidance | None = field(
        default=None, metadata=LEFT_OUT_IF_NONE
    )
    frames: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    fps: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenTable:
    """The scheduler coefficients that the build computed. A runtime that computes others must not run the bundle."""

    num_inference_steps: int
    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedLora:
    """A LoRA that the build has added to the weights.

    Attributes:
        file: the name of its file, without folders.
        sha256: the file's hash.
        scale: the factor of its changes.
        components: the components of the checkpoint that it changes, such as "transformer".
    """

    file: str
    sha256: str
    scale: float
    components: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        family: a label for people. No code reads it.
        files: files that belong to no single artifact, such as tokenizers.
        tools: the versions of the libraries that built the bundle.
        guidance: how guidance_scale reaches the denoiser. All bundles that are older than this field use CFG.
        loras: the LoRAs in the weights, in the order in which they were added.
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
    loras: tuple[FoldedLora, ...] = ()
    digest: str = ""

    def step_contract(self, denoiser: StageSpec) -> StepContract:
        """The contract of a step with this bundle's denoiser, given the spec of the artifact that runs."""
        return StepContract.of(denoiser, self.guidance)

    def all_files(self) -> Iterator[FileRef]:
        """Every file whose hash is in the manifest, each once: all but manifest, signature and certificate."""
        seen: set[str] = set()
        artifacts = (a for stage in self.stages.values() for a in stage.artifacts)
        golden = (stage.golden for stage in self.stages.values() if stage.golden)
        for ref in (*self.files, *golden, *(ref for a in artifacts for ref in a.files)):
            if ref.path not in seen:
                seen.add(ref.path)
                yield ref


def sealed(manifest: Manifest) -> Manifest:
    """The manifest, sealed: its `digest` is set to the hash of all other fields."""
    return replace(manifest, digest=digest_of(to_json(replace(manifest, digest=""))))


def save_manifest(manifest: Manifest, bundle: Path) -> Path:
    """Seal the manifest and write manifest.json."""
    return write_atomic(bundle / MANIFEST, serialize(to_json(sealed(manifest))))


def load_manifest(bundle: Path) -> Manifest:
    """Read manifest.json, and check its form, schema version, digest and values, and that no path leaves the bundle.

    Raises:
        BundleError: one of these checks fails. The message names the field.
    """
    path = bundle / MANIFEST
    rebuild = mend(bundle)
    try:
        bundle.stat()
    except (OSError, ValueError) as e:  # ValueError: a NUL
        why, hint = getattr(e, "strerror", None) or e, "check the path of the bundle"
        if isinstance(e, FileNotFoundError):
            why, hint = "the path does not exist", f"{hint}, or build one: ditc build CHECKPOINT -o {bundle}"
        raise BundleError(f"{bundle} is not a bundle: {why}", hint=hint) from e
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises if the bundle may not be searched)
        raise BundleError(
            f"{bundle} is not a bundle: it has no {MANIFEST}", hint=meant(bundle, MANIFEST) or rebuild
        )
    try:
        content = path.read_bytes()
        data = json.loads(content)
        digest = digest_of({**data, "digest": ""}) if isinstance(data, dict) else ""
        serialized = serialize(data)
    except (ValueError, RecursionError) as e:  # also a string that has no encoding
        raise BundleError(f"{path} is not JSON: {e}", hint=rebuild) from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r:.60}, but this version of ditc reads {SCHEMA_VERSION}",
            hint="update ditc" if isinstance(version, int) and version > SCHEMA_VERSION else rebuild,
        )
    if data.get("digest") != digest:
        raise BundleError(
            f"{path} was changed after the build: its digest does not match its content", hint=rebuild
        )
    if serialized != content:  # the digest is a hash of the values, and does not show a changed space
        raise BundleError(
            f"{path} was changed after the build: its bytes are not what ditc writes", hint=rebuild
        )
    try:
        check_numbers(data)
        manifest = from_json(Manifest, data)
        check_manifest(manifest)
    except Mismatch as e:
        raise BundleError(f"{path}: {e}", hint=rebuild) from e
    for ref in manifest.all_files():
        check_inside(ref.path)
    _check_tokenizers(manifest, path)
    return manifest


def mend(bundle: Path) -> str:
    """The hint for a damaged bundle. A folder of links is in the hub's cache, and nothing is built into that."""
    if os.path.islink(bundle / MANIFEST):  # noqa: PTH114 (Path.is_symlink raises for a name that is too long)
        return f"remove {bundle} and the files that its links name, and fetch it again with ditc pull"
    return f"rebuild with: ditc build CHECKPOINT -o {bundle}"


def _check_tokenizers(manifest: Manifest, path: Path) -> None:
    """Check that the path of every tokenizer in `text`, by which it is opened, is among the files with a hash."""
    listed = {ref.path for ref in manifest.files}
    for spec in manifest.text:
        if spec.tokenizer not in listed:
            raise BundleError(
                f"{path}: tokenizer {spec.tokenizer!r} is not among the bundle's files",
                hint="do not use this bundle",
            )


def check_inside(path: str) -> None:
    """Raise BundleError unless a path in a manifest is relative and stays inside the bundle on every platform.

    It must also be a name that file systems and terminals take: printable, and no part over 255 bytes.
    """
    parts = PurePosixPath(path).parts
    outside = not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path
    if outside or not path.isprintable() or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise BundleError(
            f"the manifest names {path[:MAX_NAME_BYTES]!r}, which is not a plain path inside the bundle",
            hint="do not use this bundle",
        )
