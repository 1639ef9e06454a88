"""`ditc batch` as users call it: processes, kills, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.cli import main
from ditc.runtime.offline.folder import RESULTS
from ditc.runtime.pipeline import Pipeline

SMALL = {"height": 64, "width": 64, "steps": 2}
PATIENCE_S = 120.0


def requests(path: Path, count: int, **given: Any) -> Path:
    lines = [{"prompt": f"cat {i}", **SMALL, **given} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(bundle: Path, source: Path, out: Path, *options: str) -> list[str]:
    return ["batch", str(bundle), str(source), "-o", str(out), "--threads", "1", *options]


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_killed_run_goes_on_and_every_folder_is_equal_whatever_the_number_of_workers(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, killed, whole = requests(tmp_path / "in.jsonl", 12), tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "ditc.runtime.cli", *command(tiny_bundle, source, killed, "--workers", "2")],
        stderr=subprocess.DEVNULL,
    )
    begin = monotonic()
    while not (killed / RESULTS).exists() or not (killed / RESULTS).stat().st_size:
        assert monotonic() - begin < PATIENCE_S and process.poll() is None
        sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (killed / RESULTS).read_bytes()
    kept = [json.loads(line) for line in before.splitlines(keepends=True) if line.endswith(b"\n")]
    times = {r["line"]: (killed / r["pictures"][0]["file"]).stat().st_mtime_ns for r in kept}
    assert 0 < len(kept) < 12
    assert main(command(tiny_bundle, source, killed, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["lines"], summary["done"], summary["drawn_now"]) == (12, 12, 12 - len(kept))
    for result in kept:  # nothing that was finished is drawn again
        assert (killed / result["pictures"][0]["file"]).stat().st_mtime_ns == times[result["line"]]
    assert main(command(tiny_bundle, source, whole)) == 0
    assert tree(killed) == tree(whole)
    assert len(tree(whole)) == 12 + 2
    assert main(command(tiny_bundle, source, whole, "--json")) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["drawn_now"] == 0


def test_lines_that_failed_are_recorded_and_the_exit_code_says_so(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = requests(tmp_path / "in.jsonl", 2), tmp_path / "out"
    with source.open("a") as file:
        file.write('{"prompt": "a", "height": 63}\n\n{"promt": "a"}\n')
    assert main(command(tiny_bundle, source, out)) == 2  # nothing is drawn
    assert "line 4: it is empty (remove the empty line); " in capsys.readouterr().err and not out.exists()
    assert main(command(tiny_bundle, source, out, "--skip-invalid")) == 1
    shown = capsys.readouterr()
    assert "2 of 5 lines drawn, 3 failed" in shown.out
    results = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    assert [result["status"] for result in results] == ["done", "done", "failed", "failed", "failed"]
    for number, message in ((3, "height 63"), (4, "it is empty"), (5, "a request has no field 'promt'")):
        assert message in results[number - 1]["error"]["message"]
        assert f"error: line {number}: " in shown.err
    assert main(command(tiny_bundle, source, out, "--skip-invalid", "--retry-failed")) == 1
    assert "now 0 pictures" in capsys.readouterr().out
    assert [json.loads(line) for line in (out / RESULTS).read_text().splitlines()] == results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0"), "--workers is 0"),
        (("--max-batch", "-1"), "--max-batch is -1"),
        (("--devices", "0,,1"), "--devices is '0,,1'"),
        (("--device", "0", "--devices", "0"), "--device and --devices are both given"),
        (("--local", "--ray"), "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(command(tmp_path, tmp_path / "in.jsonl", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_another_input_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(tiny_bundle, requests(tmp_path / "a.jsonl", 1), out)) == 0
    before = tree(out)
    assert main(command(tiny_bundle, requests(tmp_path / "b.jsonl", 2), out)) == 2
    assert "belongs to another run: it has input_sha256" in capsys.readouterr().err
    assert tree(out) == before


def test_without_ray_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(tmp_path, tmp_path / "in.jsonl", tmp_path / "out", "--ray")) == 2
    assert 'pip install "ditc[ray]"' in capsys.readouterr().err


def test_lines_draw_from_pictures_beside_the_input(control_bundle: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    edges, photo = (Image.fromarray(each) for each in noise)
    (tmp_path / "edges").mkdir()
    edges.save(tmp_path / "edges" / "a.png")
    photo.save(tmp_path / "photo.png")
    control = {"control_image": "edges/a.png", "controlnet_conditioning_scale": 0.5}
    lines: list[dict[str, Any]] = [
        {},
        control,
        {**control, "height": None, "width": None},
        {"image": "photo.png", "strength": 0.5},
        {"image": "photo.png", "mask_image": "edges/a.png", **control},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    common = {"prompt": "cat", **SMALL, "seed": 3, "allow_uniform": True}
    source.write_text("".join(json.dumps({**common, **line}) + "\n" for line in lines))
    assert main(command(control_bundle, source, out)) == 0
    results = {r["line"]: r for r in map(json.loads, (out / RESULTS).read_text().splitlines())}
    opened = {"edges/a.png": edges, "photo.png": photo}
    with Pipeline.load(control_bundle, threads=1) as pipeline:
        for number, line in enumerate(lines, start=1):
            given = {name: opened[v] if name.endswith("image") else v for name, v in line.items()}
            size = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "allow_uniform": True}
            alone = pipeline("cat", **size | {name: v for name, v in given.items() if v is not None}).images[
                0
            ]
            (picture,) = results[number]["pictures"]
            assert hashlib.sha256(alone.tobytes()).hexdigest() == picture["pixels_sha256"], line
            assert {name: results[number].get(name) for name in line if name.endswith("image")} == {
                name: path for name, path in line.items() if name.endswith("image")
            }
    assert (
        len({r["pictures"][0]["pixels_sha256"] for r in results.values()}) == 4
    )  # lines 2 and 3 are the same


def test_lines_whose_pictures_are_missing_are_found_before_anything_is_drawn(
    control_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = requests(tmp_path / "in.jsonl", 1, control_image="edges.png"), tmp_path / "out"
    assert main(command(control_bundle, source, out)) == 2
    assert "line 1: control_image" in capsys.readouterr().err and not out.exists()
