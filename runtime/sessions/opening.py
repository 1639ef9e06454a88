"""Opening a stage with the row of its backend. A stage that cannot run here is refused before its file is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.runtime.bundle.references import check_references
from ditc.runtime.errors import SessionError
from ditc.runtime.gpu import Gpu, find_gpu
from ditc.runtime.sessions.registry import GRAPH_BACKEND, find_row, library_version, row_of, rows

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import Artifact
    from ditc.runtime.load_options import LoadOptions
    from ditc.runtime.session import Array, Session
    from ditc.runtime.sessions.device import Device

RUN_THE_GRAPH = f"run the {row_of(GRAPH_BACKEND).title} artifact: --backend {GRAPH_BACKEND}"


def open_session(
    model: Path,
    artifact: Artifact,
    options: LoadOptions,
    device: Device | None = None,
    *,
    weights: Mapping[str, Array] | None = None,
) -> Session:
    """Open a session of the artifact's backend.

    Args:
        model: the artifact's file.
        weights: other values of initializers of the stage's graph, by name; only for backends with `open_changed`.
        device: the device that the engines of a bundle share (see `open_device`). With None, an engine opens one for
            itself.

    Raises:
        SessionError: the backend cannot run on this machine, or cannot load the file.
        BundleError: the file refers to files that the manifest does not list.
    """
    check_artifact(artifact)
    check_runs(artifact)
    check_references(model, artifact)
    row = row_of(artifact.backend)
    if weights:
        if row.open_changed is None:
            raise SessionError(f"{artifact.spec.name}: {row.title} cannot change weights", hint=RUN_THE_GRAPH)
        return row.open_changed(row, model, artifact, options, device, weights)
    return row.open(row, model, artifact, options, device)


def check_runs(artifact: Artifact) -> None:
    """Raise SessionError if this machine lacks something that the artifact's backend needs."""
    row = row_of(artifact.backend)
    lack = row.lack(row)
    if lack:
        raise SessionError(
            f"{artifact.spec.name}: {lack}", hint=f"or {RUN_THE_GRAPH}" if row.builds_engines else None
        )


def check_artifact(artifact: Artifact) -> None:
    """Refuse an artifact of an unknown backend, and an engine that was not built for this machine.

    Raises:
        SessionError: the message says what the engine was built for and what this machine has.
    """
    row = find_row(artifact.backend)
    if row is None:
        raise SessionError(
            f"{artifact.spec.name}: this version of ditc does not know the backend {artifact.backend!r}",
            hint="update ditc, or run another artifact of the bundle",
        )
    if row.same_library or row.same_gpu:
        gpu = find_gpu() if row.same_gpu else None
        check_engine(artifact, gpu=gpu, library=library_version(artifact.backend))


def check_engine(artifact: Artifact, *, gpu: Gpu | None, library: str | None) -> None:
    """Refuse an engine that was built for another GPU or library version, if its backend's row says that this matters.

    Args:
        gpu: this machine's GPU, if it has one.
        library: the installed version of the backend's library, if there is one.

    Raises:
        SessionError: the library or the GPU is missing, the library has another version, or the GPU is not among the
            engine's targets.
    """
    row, stage = row_of(artifact.backend), artifact.spec.name
    rebuild = f"build it here: ditc build CHECKPOINT -o BUNDLE --backend {row.name}"
    if library is None:
        raise SessionError(
            f"{stage}: {row.name} is not installed, so its engine cannot run", hint=row.install
        )
    if row.same_library and artifact.library is not None and artifact.library != library:
        raise SessionError(
            f"{stage}: the engine was built with {row.name} {artifact.library}, but this machine has {library}",
            hint=f"pip install {row.packages[0]}=={artifact.library}, or {rebuild}",
        )
    if not row.same_gpu:
        return
    if gpu is None:
        raise SessionError(
            f"{stage}: this machine has no NVIDIA GPU to run a {row.name} engine",
            hint=RUN_THE_GRAPH,
        )
    if row.targets and gpu.sm not in artifact.targets:
        builders = " or ".join(f"--backend {other.name}" for other in rows() if other.built_on_gpu)
        other = f"{row.title} does not support {gpu.sm}: build here with {builders}, or {RUN_THE_GRAPH}"
        raise SessionError(
            f"{stage}: the engine is for {', '.join(artifact.targets)}, but this GPU ({gpu.name}) is {gpu.sm}",
            hint=f"{rebuild} --targets {gpu.sm}" if gpu.sm in row.targets else other,
        )
    if artifact.gpu is not None and artifact.targets == ("this-gpu",) and artifact.gpu != gpu.name:
        raise SessionError(
            f"{stage}: the engine was built on and for {artifact.gpu}, but this GPU is {gpu.name}",
            hint=rebuild,
        )
