"""What goes wrong with the data packages ends in one clear line, and leaves nothing half-done behind."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from demo.errors import DemoError
from demo.train import packages
from demo.train.__main__ import main

_SMALL = replace(packages.EMOJILIB, file="small.tgz")


def _archive(cache: Path) -> packages.Package:
    """A small package in the cache, and its true checksum."""
    path = cache / "packages" / _SMALL.file
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tgz:
        entry = tarfile.TarInfo("package/a.json")
        entry.size = 2
        tgz.addfile(entry, io.BytesIO(b"{}"))
    return replace(_SMALL, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_package_with_the_pinned_checksum_is_unpacked(tmp_path: Path) -> None:
    folder = packages.unpacked(_archive(tmp_path), tmp_path)
    assert (folder / "package" / "a.json").read_text() == "{}"


def test_a_package_with_another_checksum_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    package = replace(_archive(tmp_path), sha256="0" * 64)
    with pytest.raises(DemoError, match=r"sha256 .* not 0000.*hint: delete"):
        packages.unpacked(package, tmp_path)
    assert [f.name for f in (tmp_path / "packages").iterdir()] == ["small.tgz"]


def test_a_truncated_download_is_refused(tmp_path: Path) -> None:
    package = _archive(tmp_path)
    path = tmp_path / "packages" / package.file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DemoError, match="sha256"):
        packages.unpacked(package, tmp_path)


def test_a_client_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DemoError, match=r"npm, needed for emojilib, was not found. hint: install Node"):
        packages.unpacked(packages.EMOJILIB, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_interrupted_client_leaves_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "npm"
    fake.write_text("#!/bin/sh\nprintf half > emojilib-4.0.3.tgz\necho 'ECONNRESET' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(DemoError, match="could not download emojilib: ECONNRESET"):
        packages.unpacked(packages.EMOJILIB, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_step_without_its_inputs_says_which_step_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo.train", "autoencoder", "--cache", str(tmp_path), "--threads", "1"])
    assert main() == 1
    assert "python -m demo.train data" in capsys.readouterr().err
