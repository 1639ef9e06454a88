"""An output folder survives a kill at any moment, and is not mixed up with another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.errors import OutputError, UsageError
from ditc.runtime.offline.folder import PICTURES, RESULTS, RUN, VIDEOS, file_path, open_folder
from ditc.runtime.offline.result import failed

IDENTITY = {"bundle": "b" * 64, "input_sha256": "i" * 64, "lines": 5}


def done(line: int, folder: Path | None = None) -> dict[str, Any]:
    path = file_path(PICTURES, line, 0, 1, "png")
    if folder is not None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return {"line": line, "id": None, "status": "done", "pictures": [{"file": path.as_posix()}]}


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def waiting(folder: Path, *, retry_failed: bool = False) -> list[int]:
    with open_folder(folder, IDENTITY, 5) as opened:
        return [line for line in range(1, 6) if opened.waits(line, retry_failed=retry_failed)]


def test_what_is_finished_does_not_wait_any_more(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out", IDENTITY, 5) as folder:
        folder.add(done(2, folder.path))
        folder.add(failed(4, None, "broken", None))
        assert (folder.done, folder.failed, folder.ended) == (1, 1, 2)
    assert waiting(tmp_path / "out") == [1, 3, 5]
    assert waiting(tmp_path / "out", retry_failed=True) == [1, 3, 4, 5]


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_half_a_result_is_cut_off_and_its_line_waits_again(tmp_path: Path, kept: int) -> None:
    out = tmp_path / "out"
    with open_folder(out, IDENTITY, 5) as folder:
        folder.add(done(1, out))
        whole = (out / RESULTS).stat().st_size
        folder.add(done(3, out))
    with (out / RESULTS).open("r+b") as file:
        file.truncate(whole + kept)
    assert waiting(out) == [2, 3, 4, 5]
    with open_folder(out, IDENTITY, 5) as folder:
        folder.add(done(3, out))
    assert results(out) == [done(1), done(3)]


def test_a_line_whose_picture_was_removed_waits_again(tmp_path: Path) -> None:
    with open_folder(tmp_path, IDENTITY, 5) as folder:
        folder.add(done(1, tmp_path))
        folder.add(done(2, tmp_path))
    (tmp_path / file_path(PICTURES, 1, 0, 1, "png")).unlink()
    assert waiting(tmp_path) == [1, 3, 4, 5]


def test_finished_results_are_in_the_order_of_the_input_and_the_last_one_counts(tmp_path: Path) -> None:
    with open_folder(tmp_path, IDENTITY, 5) as folder:
        folder.add(done(3, tmp_path))
        folder.add(failed(1, None, "broken", None))
    with open_folder(tmp_path, IDENTITY, 5) as folder:
        folder.add(done(1, tmp_path))
        folder.finish()
    assert results(tmp_path) == [done(1), done(3)]


@pytest.mark.parametrize("name", IDENTITY)
def test_a_folder_of_another_run_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    with open_folder(tmp_path, IDENTITY, 5):
        pass
    before = (tmp_path / RUN).read_bytes()
    with (
        pytest.raises(
            UsageError, match=f"belongs to another run: it has {name} .* instead of 'other'"
        ) as raised,
        open_folder(tmp_path, {**IDENTITY, name: "other"}, 5),
    ):
        pass
    assert raised.value.hint and (tmp_path / RUN).read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with (
        pytest.raises(UsageError, match=r"holds other files, such as 'holiday\.jpg'"),
        open_folder(tmp_path, IDENTITY, 5),
    ):
        pass


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        open_folder(tmp_path, IDENTITY, 5),
        pytest.raises(OutputError, match="another process is working"),
        open_folder(tmp_path, IDENTITY, 5),
    ):
        pass


@pytest.mark.parametrize(
    "content", ["nonsense", '{"line": 9, "status": "done", "pictures": []}', "[]", '{"line": "1"}']
)
def test_results_that_somebody_has_changed_are_refused_by_line(tmp_path: Path, content: str) -> None:
    with open_folder(tmp_path, IDENTITY, 5) as folder:
        folder.add(failed(1, None, "broken", None))
    with (tmp_path / RESULTS).open("a") as file:
        file.write(content + "\n")
    with (
        pytest.raises(UsageError, match="line 2: this is not a result of a batch"),
        open_folder(tmp_path, IDENTITY, 5),
    ):
        pass


def test_folders_of_pictures_stay_small() -> None:
    assert file_path(PICTURES, 12, 0, 1, "png").as_posix() == "pictures/0000/00000012.png"
    assert file_path(VIDEOS, 123_456, 3, 4, "mp4").as_posix() == "videos/0012/00123456-3.mp4"
