"""`ditc run` with a bundle of videos: every kind of file, what it refuses, and the verbs that take pictures alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.cli import main
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline

RUN = ("a cat", "--seed", "3", "--steps", "1", "--frames", "5", "--height", "32", "--width", "64")
# WebP with losses keeps one colour for four pixels, and the tiny model's noise has another colour in each.
LOSSY_DB = 25.0


@pytest.fixture(scope="module")
def frames(video_bundle: Path) -> list[np.ndarray]:
    with Pipeline.load(video_bundle, threads=1) as pipeline:
        output = pipeline("a cat", seed=3, num_inference_steps=1, frames=5, height=32, width=64)
    return [np.asarray(frame) for frame in output.frames[0]]


def test_a_folder_holds_every_frame_bit_for_bit_and_the_settings(video_bundle, frames, tmp_path) -> None:
    assert main(["run", str(video_bundle), *RUN, "-o", str(tmp_path / "cat")]) == 0
    files = sorted((tmp_path / "cat").iterdir())
    assert [file.name for file in files] == [f"{index:05d}.png" for index in range(5)]
    for file, frame in zip(files, frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), frame)
    first = Image.open(files[0])
    assert first.text["fps"] == "8" and json.loads(first.text["settings"])["frames"] == 5
    assert main(["run", str(video_bundle), *RUN, "-o", str(tmp_path / "cat")]) != 0  # it stays as it is
    assert sorted((tmp_path / "cat").iterdir()) == files


def test_a_webp_file_is_animated_and_carries_the_settings(video_bundle, frames, tmp_path) -> None:
    path = tmp_path / "cat.webp"
    assert main(["run", str(video_bundle), *RUN, "-o", str(path), "--fps", "4"]) == 0
    film = Image.open(path)
    assert film.n_frames == 5 and film.size == (64, 32)
    assert json.loads(film.getexif()[0x010E])["prompt"] == "a cat"
    film.seek(4)
    assert psnr(np.asarray(film.convert("RGB")) / 255, frames[4] / 255) >= LOSSY_DB
    assert film.info["duration"] == 250


def test_an_mp4_file_has_all_frames_and_the_settings(video_bundle, frames, tmp_path) -> None:
    av = pytest.importorskip("av", reason="needs the extra: pip install ditc[video]")
    path = tmp_path / "cat.mp4"
    assert main(["run", str(video_bundle), *RUN, "-n", "2", "-o", str(path)]) == 0
    assert not path.exists()
    with av.open(str(path.with_name("cat-0.mp4"))) as film:
        read = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 8
        assert json.loads(film.metadata["comment"])["seed"] == "3"
    assert len(read) == 5 and read[0].shape == (32, 64, 3)
    assert path.with_name("cat-1.mp4").stat().st_size > 0


def test_an_mp4_file_with_odd_sides_gets_one_more_row_and_column(tmp_path) -> None:
    av = pytest.importorskip("av", reason="needs the extra: pip install ditc[video]")
    from ditc.runtime.video_files import save_video

    grey = Image.new("RGB", (33, 17), (120, 130, 140))
    save_video([grey, grey], tmp_path / "odd.mp4", {}, fps=16)
    with av.open(str(tmp_path / "odd.mp4")) as film:
        (frame, _) = (frame.to_ndarray(format="rgb24") for frame in film.decode(video=0))
    assert frame.shape == (18, 34, 3) and np.abs(frame.astype(int) - (120, 130, 140)).max() <= 4


def test_without_pyav_the_error_says_how_to_install_it(video_bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("ditc.runtime.video_files.find_spec", lambda name: None)
    assert main(["run", str(video_bundle), *RUN, "-o", str(tmp_path / "cat.mp4")]) != 0
    assert 'pip install "ditc[video]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "6", "-o", "x.webp"], "frames is 6"),
        (["--frames", "4001", "-o", "x.webp"], "frames is 4001"),
        (["-o", "x.png"], "x.png is not a kind of file that holds a video"),
        (["--fps", "0", "-o", "x.webp"], "--fps is 0"),
    ],
)
def test_what_no_video_can_be_is_refused(
    arguments, message, video_bundle, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(video_bundle), "a cat", *arguments]) != 0
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "5"], "frames is 5, but this bundle draws pictures"),
        (["-o", "x.mp4"], "x.mp4 is not a .png"),
        (["--fps", "5"], "--fps 5 is given, but this bundle draws pictures"),
    ],
)
def test_a_bundle_of_pictures_draws_no_video(
    arguments, message, tiny_bundle, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(tiny_bundle), "a cat", *arguments]) != 0
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_verbs_that_draw_pictures_refuse_a_bundle_of_videos(video_bundle, tmp_path, capsys) -> None:
    for verb in (
        ["bench", str(video_bundle)],
        ["export-triton", str(video_bundle), "-o", str(tmp_path / "models")],
    ):
        assert main(verb) != 0
        captured = capsys.readouterr().err
        assert f"this bundle draws videos, and ditc {verb[0]} takes" in captured and "ditc run" in captured


def test_inspect_says_how_many_frames_there_are(video_bundle, capsys) -> None:
    assert main(["inspect", str(video_bundle)]) == 0
    shown = capsys.readouterr().out
    assert (
        "9 frames at 8 a second" in shown
        and "vae_decoder_next takes latents(batch,16,1,height,width)" in shown
    )
