"""Lines that are drawn together give the pictures that Pipeline draws of each alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ditc.runtime.errors import OutputError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.offline.draw import Drawer
from ditc.runtime.offline.lines import Line, parse_line
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.scheduling.work import Work

SMALL = {"height": 64, "width": 64, "steps": 2}


def line(number: int, **given: Any) -> Line:
    return parse_line(json.dumps({"prompt": "red cat", **SMALL, **given}).encode(), number)


LINES = [
    line(1, seed=1),
    line(2, prompt="blue dog", negative_prompt="cat", seed=2**40),
    line(3, steps=3, guidance_scale=1.0),
    line(4, size="96x64", height=None, width=None),
    line(5, num_images_per_prompt=2, id="two"),
    line(6, seed=1),
]


@pytest.fixture
def drawer(tiny_bundle: Path, tmp_path: Path) -> Iterator[Drawer]:
    opened = Drawer(tiny_bundle, LoadOptions(threads=1), tmp_path, inputs=tmp_path)
    # The machine decides whether batches pay, so it is told that they do.
    times, most = opened._scheduler.times, opened._scheduler.max_batch
    times.best_size = lambda key, count: min(count, most)  # type: ignore[method-assign]
    yield opened
    opened.close()


def draw(drawer: Drawer, lines: list[Line]) -> dict[int, dict[str, Any]]:
    for each in lines:
        drawer.submit(each)
    return {result["line"]: result for result in (drawer.take() for _ in lines)}


def test_pictures_are_those_of_pipeline_and_have_the_digests(
    drawer: Drawer, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = Work.step
    monkeypatch.setattr(
        Work, "step", lambda self, pictures: (sizes.append(len(pictures)), step(self, pictures))[1]
    )
    results = draw(drawer, LINES)
    assert max(sizes) > 1  # lines have shared runs
    for each in LINES:
        result, alone = results[each.number], pipeline.draw(each.request(tmp_path))
        assert (result["status"], result["seed"], result["id"]) == ("done", each.seed, each.id)
        assert result["settings"]["num_inference_steps"] == each.asked["num_inference_steps"]
        assert len(result["pictures"]) == len(alone.images) == each.asked.get("num_images_per_prompt", 1)
        for picture, image in zip(result["pictures"], alone.images, strict=True):
            path = tmp_path / picture["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == picture["sha256"]
            with Image.open(path) as saved:
                assert saved.tobytes() == image.tobytes()
                assert saved.text["seed"] == str(each.seed)  # type: ignore[attr-defined]
            assert hashlib.sha256(image.tobytes()).hexdigest() == picture["pixels_sha256"]
    assert results[1]["pictures"][0]["pixels_sha256"] == results[6]["pictures"][0]["pixels_sha256"]


def test_a_line_that_the_bundle_cannot_draw_fails_alone(drawer: Drawer) -> None:
    results = draw(drawer, [line(1), line(2, height=63), line(3, seed=2**70), line(4)])
    assert [results[number]["status"] for number in (1, 2, 3, 4)] == ["done", "failed", "failed", "done"]
    assert "height 63" in results[2]["error"]["message"] and results[2]["error"]["hint"]
    assert "seed" in results[3]["error"]["message"] and results[3]["pictures"] == []


def test_lines_whose_stage_has_failed_are_drawn_again(
    drawer: Drawer, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failures = Work.step, [RuntimeError("the device was lost")]

    def broken_once(self: Work, pictures: Any) -> None:
        if failures:
            error = failures.pop()
            with self._faults([picture.job for picture in pictures]):
                raise error
            return
        step(self, pictures)

    monkeypatch.setattr(Work, "step", broken_once)
    results = draw(drawer, [line(1), line(2)])
    assert {result["status"] for result in results.values()} == {"done"} and not failures


def test_a_disk_that_is_full_is_no_failure_of_a_line(drawer: Drawer, tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file in the place of the folder")
    drawer.submit(line(1))
    with pytest.raises(OutputError, match=r"00000001\.png"):
        drawer.take()
