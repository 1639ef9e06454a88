"""`ditc batch` with a bundle that draws videos: from texts and from pictures, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.cli import main
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.offline import draw
from ditc.runtime.offline.draw import Drawer
from ditc.runtime.offline.folder import RESULTS
from ditc.runtime.offline.lines import parse_line
from ditc.runtime.offline.result import VideoFiles
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.video_files import video_bytes

SETTINGS: dict[str, Any] = {"height": 32, "width": 64, "frames": 5, "num_inference_steps": 2}
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three lines: from a text, from a picture, and two videos of a prompt."""
    (tmp_path / "in").mkdir()
    PICTURE.save(tmp_path / "in" / "first.png")
    lines = [
        {"prompt": "a cat", "seed": 3},
        {"id": "picture", "prompt": "a cat", "seed": 3, "image": "first.png"},
        {"prompt": "dogs", "seed": 4, "num_images_per_prompt": 2},
    ]
    file = tmp_path / "in" / "lines.jsonl"
    file.write_text("".join(json.dumps({**SETTINGS, **line}) + "\n" for line in lines))
    return file


def batch(bundle: Path, source: Path, out: Path, *options: str) -> int:
    return main(["batch", str(bundle), str(source), "-o", str(out), "--threads", "1", *options])


def results_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def test_lines_give_the_videos_of_the_pipeline_and_a_lost_file_is_drawn_again(
    video_bundle: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    webp = ("--video-format", "webp", "--fps", "10")
    assert batch(video_bundle, source, out, *webp) == 0
    assert "now 4 videos in" in capsys.readouterr().out
    results = results_of(out)
    assert [result["status"] for result in results] == ["done"] * 3
    assert results[1]["image"] == "first.png" and results[1]["settings"]["image"] is True
    with Pipeline.load(video_bundle, threads=1) as pipeline:
        expected = [
            pipeline("a cat", seed=3, **SETTINGS).frames,
            pipeline("a cat", seed=3, image=PICTURE, **SETTINGS).frames,
            pipeline("dogs", seed=4, num_videos_per_prompt=2, **SETTINGS).frames,
        ]
    for result, videos in zip(results, expected, strict=True):
        for entry, frames in zip(result["videos"], videos, strict=True):
            content = (out / entry["file"]).read_bytes()
            assert entry["file"].startswith("videos/0000/") and entry["file"].endswith(".webp")
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
            pixels = b"".join(frame.tobytes() for frame in frames)
            assert hashlib.sha256(pixels).hexdigest() == entry["pixels_sha256"]
            same = Image.open(BytesIO(video_bytes(list(frames), "webp", {}, fps=10, threads=1)))
            found = Image.open(BytesIO(content))
            assert found.n_frames == same.n_frames == 5  # type: ignore[attr-defined]
            found.load()
            assert found.info["duration"] == 100  # milliseconds
    before = (out / RESULTS).read_bytes()
    (out / results[0]["videos"][0]["file"]).unlink()
    assert batch(video_bundle, source, out, *webp) == 0
    assert "now 1 videos in" in capsys.readouterr().out
    assert (out / RESULTS).read_bytes() == before  # equal lines give equal bytes
    assert batch(video_bundle, source, out, "--video-format", "webp") == 2  # shown at another speed
    assert "belongs to another run: it has fps 10 instead of 8" in capsys.readouterr().err


def test_mp4_files_are_equal_on_every_run(video_bundle: Path, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the extra: pip install ditc[video]")
    for name in ("one", "other"):
        assert batch(video_bundle, source, tmp_path / name) == 0
    one, other = (results_of(tmp_path / name) for name in ("one", "other"))
    assert one == other
    assert one[2]["videos"][1]["file"] == "videos/0000/00000003-1.mp4"


def test_several_videos_that_would_fill_the_memory_fail_and_one_alone_does_not(
    video_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = SETTINGS["height"] * SETTINGS["width"] * SETTINGS["frames"]
    monkeypatch.setattr(draw, "MOST_VIDEO_PIXELS", pixels - 1)
    drawer = Drawer(
        video_bundle, LoadOptions(threads=1), tmp_path, inputs=tmp_path, videos=VideoFiles("webp", 8)
    )
    try:
        for number, count in ((1, 1), (2, 64)):
            asked = {"prompt": "a cat", **SETTINGS, "num_images_per_prompt": count}
            drawer.submit(parse_line(json.dumps(asked).encode(), number))
        found = {result["line"]: result for result in (drawer.take(), drawer.take())}
    finally:
        drawer.close()
    assert found[1]["status"] == "done" and len(found[1]["videos"]) == 1
    assert found[2]["status"] == "failed" and not found[2]["pictures"]
    error = found[2]["error"]
    assert f"num_images_per_prompt is 64, and the 5 frames of each video have {pixels}" in error["message"]
    assert str(64 * pixels) in error["message"] and "a line for every video" in error["hint"]


def test_what_cannot_be_is_refused_before_any_line_is_drawn(
    video_bundle: Path,
    tiny_bundle: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("ditc.runtime.video_files.find_spec", lambda name: None)
    for bundle, options, said in (
        (
            tiny_bundle,
            ["--video-format", "webp"],
            "--video-format webp is given, but this bundle draws pictures",
        ),
        (tiny_bundle, ["--fps", "8"], "--fps 8 is given, but this bundle draws pictures"),
        (video_bundle, ["--fps", "0"], "--fps is 0"),
        (video_bundle, [], 'pip install "ditc[video]"'),
    ):
        assert batch(bundle, source, out, *options) == 2
        assert said in capsys.readouterr().err
    assert not (out / "run.json").exists()
