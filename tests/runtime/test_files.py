"""Output paths are checked before the work, and the check leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ditc.runtime.errors import OutputError, UsageError
from ditc.runtime.files import check_writable


@pytest.mark.parametrize("place", ["new.html", "there.html", "a/b/new.html"])
def test_a_file_may_be_new_or_exist_and_its_folders_may_be_missing(tmp_path: Path, place: str) -> None:
    (tmp_path / "there.html").touch()
    check_writable(tmp_path / place, "--html")
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.html"), "--html")


@pytest.mark.parametrize(
    ("place", "why"),
    [("folder", "it is a directory"), ("file/new.html", "file is a file"), ("file/a/new.html", "is a file")],
)
def test_a_folder_and_a_path_below_a_file_are_refused(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"cannot write .*{place}: .*{why}") as caught:
        check_writable(tmp_path / place, "--html")
    assert caught.value.hint == "choose another --html"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device")
def test_a_device_is_refused_even_to_root() -> None:
    with pytest.raises(OutputError, match="cannot write /dev/null: it is a device or a pipe, not a file"):
        check_writable(Path("/dev/null"), "--html")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
@pytest.mark.parametrize("place", ["/proc/new.html", "/proc/self/a/new.html"])
def test_a_path_without_permission_is_refused_even_to_root(place: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write {place}: /proc"):
        check_writable(Path(place), "--html")


@pytest.mark.parametrize("place", ["x" * 256, f"new/{'x' * 256}/y", "/".join(["x" * 250] * 17)])
def test_a_name_that_the_file_system_cannot_hold_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(OutputError, match="File name too long") as caught:
        check_writable(tmp_path / place, "-o")
    assert caught.value.hint == "choose another -o" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\0b.png", "\udcff\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_writable(tmp_path / name, "-o")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_a_disk_without_the_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*: (No space left on device|File too large)"):
        check_writable(tmp_path / "x.png", "-o", needed_bytes=2**62)
    assert not list(tmp_path.iterdir())
