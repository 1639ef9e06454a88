"""Parity of a bundle that draws videos: it passes at every level, and the worst frame decides."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.parity.levels import LEVELS
from ditc.runtime import video
from ditc.runtime.cli import main
from ditc.runtime.session import Array

CASE = ("--seeds", "0", "--threads", "1", "--steps", "2")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n")
    return path


def test_a_bundle_of_videos_passes_at_every_level_and_its_self_test(
    video_bundle: Path,
    video_checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = Path(shutil.copytree(video_bundle, tmp_path / "bundle"))
    run = ["parity", str(bundle), "--against", str(video_checkpoint), *CASE, "--prompts", str(prompts)]
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "the worst of 9 frames" in printed
    # A video from a text and one from a picture, each against two references.
    assert re.search(r"^trajectory +pass +4/4 ", printed, re.MULTILINE)
    (entry,) = json.loads((bundle / "certificate.json").read_text())["entries"]
    assert {line["name"] for line in entry["parity"]["lines"] if line["passed"]} >= {
        level.value for level in LEVELS
    }
    assert main(["verify", str(bundle)]) == 0
    assert sum(file.stat().st_size for file in (bundle / "golden").iterdir()) < 4e6


def test_one_wrong_frame_is_found_and_named(
    video_bundle: Path,
    video_checkpoint: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = video.decoded_chunks

    def spoiled(*arguments: Any, **tiles: Any) -> Iterator[Array]:
        for index, frames in enumerate(right(*arguments, **tiles)):
            yield np.concatenate([frames[:2], frames[2:3, :, ::-1], frames[3:]]) if index == 1 else frames

    monkeypatch.setattr(video, "decoded_chunks", spoiled)
    run = ["parity", str(video_bundle), "--against", str(video_checkpoint), *CASE, "--prompts", str(prompts)]
    assert main([*run, "--level", "picture"]) == 1
    assert (
        "the worst of 9 frames: 3" in capsys.readouterr().out
    )  # the first one, and the third of the next four
