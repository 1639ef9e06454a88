"""Files and folders appear whole or not at all, even with other writers and after a killed process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ditc.runtime import atomic
from ditc.runtime.atomic import (
    SUFFIX,
    atomic_files,
    atomic_folder,
    atomic_path,
    remove_leftovers,
    scratch_file,
    write_atomic,
)
from ditc.runtime.errors import OutputError, UsageError

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes, links and signals of POSIX")


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield lambda mask: [os.umask(mask), None][1]
    os.umask(before)


@pytest.fixture
def taken_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first temporary name that the writer will try for tmp_path / "out"."""
    tokens = iter(["guessed", "second"])
    monkeypatch.setattr(atomic, "_token", lambda: next(tokens))
    return tmp_path / f".out.guessed{SUFFIX}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# Files


def test_text_and_bytes_are_written_as_they_are_and_folders_are_made(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a" / "b" / "out", "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert write_atomic(path, b"\0\r\n").read_bytes() == b"\0\r\n"
    assert names(path.parent) == ["out"]


def test_the_temporary_file_is_beside_the_path_and_has_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / ("n" * 250)) as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, SUFFIX)
        assert partial.read_bytes() == b""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = write_atomic(tmp_path / "out", "old")
    with pytest.raises(error), atomic_path(path) as partial:
        partial.write_text("half")
        raise error
    assert names(tmp_path) == ["out"] and path.read_text() == "old"


@POSIX
def test_a_killed_process_leaves_the_old_file_and_leftovers_that_can_be_removed(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "out", "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from ditc.runtime.atomic import *\n"
        "with atomic_path(Path(sys.argv[1])) as partial, atomic_folder(Path(sys.argv[2])) as folder:\n"
        "    partial.write_text('half'); (folder / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "folder"])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and not (tmp_path / "folder").exists()
    assert len(names(tmp_path)) == 3, "the process must have been killed in the middle"
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]


def test_only_temporary_files_of_the_folder_itself_are_left_behind_ones(tmp_path: Path) -> None:
    theirs = ["partial", f"notes{SUFFIX}", f".notes{SUFFIX}", f".x.123{SUFFIX}", f"x.{'0' * 16}{SUFFIX}"]
    for name in theirs:
        (tmp_path / name).touch()
    (tmp_path / f".x.{'0' * 16}{SUFFIX}" / "b").mkdir(parents=True)
    (tmp_path / "subfolder" / f".x.{'0' * 16}{SUFFIX}").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*theirs, "subfolder"]) and len(names(tmp_path / "subfolder")) == 1


@POSIX
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_under_the_temporary_name_is_not_followed(
    tmp_path: Path, taken_name: Path, dangling: bool
) -> None:
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("precious")
    taken_name.symlink_to(victim)
    path = write_atomic(tmp_path / "out", "new")
    assert path.read_text() == "new" and not path.is_symlink()
    assert taken_name.is_symlink(), "the link belongs to somebody else"
    assert not victim.exists() if dangling else victim.read_text() == "precious"


@POSIX
def test_a_link_of_the_files_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    path = write_atomic(tmp_path / "out", "new")
    assert not path.is_symlink() and path.read_text() == "new"
    assert (tmp_path / "target").read_text() == "precious"


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_what_the_umask_gives(tmp_path: Path, umask: Callable[[int], None], mask: int) -> None:
    umask(mask)
    with atomic_path(tmp_path / "private") as partial:
        partial.unlink()  # safetensors makes a new file that only its owner can read
        partial.touch(mode=0o600)
    with atomic_files(tmp_path / "one") as folder:
        (folder / "one").touch(mode=0o600)
    with atomic_folder(tmp_path / "folder"):
        pass
    files = [tmp_path / "private", tmp_path / "one", write_atomic(tmp_path / "text", "")]
    assert {mode(path) for path in files} == {0o666 & ~mask}
    assert mode(tmp_path / "folder") == 0o777 & ~mask


def test_two_threads_never_leave_a_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "out", [bytes([number]) * 10**5 for number in (1, 2)]

    def write(content: bytes) -> None:
        for _ in range(50):
            write_atomic(path, content, durable=False)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["out"] and path.read_bytes() in contents


def test_two_processes_never_leave_a_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "out", [bytes([number]) * 10**5 for number in (1, 2)]
    code = (
        "import sys; from pathlib import Path; from ditc.runtime.atomic import write_atomic\n"
        "for _ in range(50):\n"
        "    write_atomic(Path(sys.argv[1]), bytes([int(sys.argv[2])]) * 10**5, durable=False)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), number]) for number in "12"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert path.read_bytes() in contents
    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["out"] and path.read_bytes() in contents


def test_the_disk_has_the_content_before_the_name_and_caches_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: [calls.append("fsync"), sync(number)][1])
    monkeypatch.setattr(os, "replace", lambda old, new: [calls.append("move"), move(old, new)][1])
    write_atomic(tmp_path / "cache", "", durable=False)
    assert calls == ["move"]
    write_atomic(tmp_path / "out", "")
    assert calls[1:3] == ["fsync", "move"]
    assert calls[3:] == (["fsync"] if os.name == "posix" else []), "the folder holds the name"


def test_a_platform_that_cannot_open_folders_is_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows raises PermissionError."""
    real = os.open

    def no_folders(path: Path, *arguments: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", no_folders)
    assert write_atomic(tmp_path / "out", "new").read_text() == "new"
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "folder" / "file").read_text() == "new"


# Paths that cannot be written


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space on that disk, or choose another -o"),
        (errno.EACCES, "get the permission to write there, or choose another -o"),
        (errno.EROFS, "make that file system writable, or choose another -o"),
        (errno.EIO, "choose another -o"),
    ],
)
def test_a_failing_disk_is_one_error_with_path_reason_and_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    path = write_atomic(tmp_path / "out", "old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as caught:
        write_atomic(path, "new", hint="choose another -o")
    assert str(caught.value) == f"cannot write {path}: {os.strerror(number)}"
    assert caught.value.hint == hint and isinstance(caught.value, UsageError)
    assert names(tmp_path) == ["out"] and path.read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
@pytest.mark.parametrize("write", [atomic_path, atomic_files, atomic_folder])
def test_an_unwritable_folder_is_named(write: Callable[..., object]) -> None:
    with pytest.raises(OutputError, match=r"^cannot write /proc/out: ") as caught, write(Path("/proc/out")):
        raise AssertionError("begun")
    assert caught.value.hint


@pytest.mark.parametrize("write", [atomic_path, atomic_files, atomic_folder])
def test_a_path_below_a_file_is_refused(tmp_path: Path, write: Callable[..., object]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*out: "), write(tmp_path / "file" / "a" / "out"):
        raise AssertionError("begun")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [atomic_path, atomic_files])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(
    tmp_path: Path, write: Callable[..., object]
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="it is a directory"), write(tmp_path / "out"):
        raise AssertionError("begun")
    assert names(tmp_path) == ["out"]


@POSIX
def test_a_device_or_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    """Root may move a file onto /dev/null, after which every program of the machine writes into it."""
    os.mkfifo(tmp_path / "out")
    with pytest.raises(OutputError, match="a device or a pipe, not a file"):
        write_atomic(tmp_path / "out", "")
    assert (tmp_path / "out").is_fifo() and names(tmp_path) == ["out"]


# Several files, folders, scratch files


def test_files_that_refer_to_each_other_are_moved_in_order_and_the_rest_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: [moved.append(new.name), move(old, new)][1])
    with atomic_files(tmp_path / "g.data", tmp_path / "absent", tmp_path / "g.onnx") as folder:
        (folder / "g.onnx").write_text("graph")
        (folder / "g.data").write_text("weights")
        (folder / "else").mkdir()
        assert names(tmp_path) == [folder.name]
    assert moved == ["g.data", "g.onnx"] == names(tmp_path)


def test_files_that_fail_leave_the_old_ones(tmp_path: Path) -> None:
    old = [write_atomic(tmp_path / name, "old") for name in ("a", "b")]
    with pytest.raises(ValueError), atomic_files(*old) as folder:
        (folder / "a").write_text("new")
        raise ValueError
    assert names(tmp_path) == ["a", "b"] and {path.read_text() for path in old} == {"old"}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert (tmp_path / "a" / "out" / "sub" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise error
    assert names(tmp_path) == []


@POSIX
@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_a_folder_does_not_replace_what_exists(tmp_path: Path, there: str) -> None:
    path = tmp_path / "out"
    if there == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir() if there == "folder" else path.touch()
    with pytest.raises(OutputError, match=r"cannot write .*out: it exists already"), atomic_folder(path):
        raise AssertionError("begun")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_somebody_else_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*out: "), atomic_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_may_take_the_place_of_an_older_one(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "out"
    if there:
        path.mkdir()
        (path / "old").touch()
    with atomic_folder(path, replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(path) == ["new"]


def test_a_folder_that_fails_leaves_the_one_that_it_was_to_replace(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out", replace=True):
        raise ValueError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_replacement_that_cannot_be_moved_leaves_the_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Either the older one cannot be moved away, or the new one cannot be moved to its place."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    moves, move = iter(range(1, 9)), Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if next(moves) == failing:
            raise PermissionError(errno.EACCES, "Permission denied")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OutputError, match="Permission denied"), atomic_folder(tmp_path / "out", replace=True):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_a_scratch_file_is_beside_its_path_and_gone_after_the_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError), scratch_file(tmp_path / "g.onnx", b"graph") as scratch:
        assert (scratch.parent, scratch.suffix, scratch.read_bytes()) == (tmp_path, SUFFIX, b"graph")
        raise ValueError
    assert names(tmp_path) == []


def test_errors_inside_the_block_of_a_scratch_file_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch_file(tmp_path / "g.onnx", b""):
        (tmp_path / "missing").read_bytes()
