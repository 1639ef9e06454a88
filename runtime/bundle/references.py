"""The files that an artifact's own file refers to: a library opens them by name, so they must be in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ditc.runtime.errors import BundleError
from ditc.runtime.sessions.registry import find_row

if TYPE_CHECKING:
    from ditc.runtime.bundle.manifest import Artifact


@dataclass(frozen=True, slots=True)
class Reference:
    """A range of bytes in another file.

    Attributes:
        owner: what refers to it, for messages.
        location: the file's name as it is written, relative to the folder of the file that it is written in.
        length: None if it is not written.
    """

    owner: str
    location: str
    offset: int
    length: int | None


def check_references(model: Path, artifact: Artifact) -> None:
    """Refuse an artifact whose file refers to anything but bytes of the data files that the manifest lists for it.

    A name must be written exactly as in the manifest, so a path that is absolute or has `..` never fits. Files of
    backends that this version of ditc does not know are not looked at, and never opened.

    Args:
        model: the artifact's file, which need not be in the bundle.

    Raises:
        BundleError: a name is not listed, a range goes beyond its file, or the file cannot be read.
    """
    row = find_row(artifact.backend)
    if row is None or row.references is None:
        return
    folder = PurePosixPath(artifact.file.path).parent
    sizes = {
        PurePosixPath(ref.path).relative_to(folder).as_posix(): ref.size_bytes
        for ref in artifact.data
        if PurePosixPath(ref.path).is_relative_to(folder)
    }
    hint = "do not use this bundle; if you built it, build it again"
    for reference in row.references(model):
        place = f"{model}: {reference.owner} is in {reference.location[:200]!r}"
        if reference.location not in sizes:
            raise BundleError(f"{place}, which the manifest does not list among its data files", hint=hint)
        size_bytes, end = sizes[reference.location], reference.offset + (reference.length or 0)
        if end > size_bytes:
            raise BundleError(f"{place} up to byte {end}, but the file has {size_bytes}", hint=hint)
