"""Requests for many pictures are drawn part by part: memory holds one part, and what is drawn is written at once."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.runtime.cache import RowCache
from ditc.runtime.cli import main
from ditc.runtime.errors import NumericsError, UsageError
from ditc.runtime.limits import MAX_PICTURES
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator
from ditc.runtime.state import DenoiseState

PROMPTS = [f"cat {i}" for i in range(6)]  # the tiny bundle draws four pictures together
SETTINGS = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, threads=1) as loaded:
        yield loaded


def test_parts_are_the_pictures_of_the_whole_request(pipeline: Pipeline) -> None:
    request = Request(prompt=PROMPTS, output_type="np", **SETTINGS)
    parts = list(pipeline.draw_each(pipeline.plan(request)))
    assert [(part.first, len(part.pictures)) for part in parts] == [(0, 4), (4, 2)]
    together = np.concatenate([picture for part in parts for picture in part.pictures])
    np.testing.assert_array_equal(together, pipeline.draw(request).images)
    alone = pipeline.draw(
        Request(
            prompt=PROMPTS[5],
            latents=Generator(5).randn((6, 8, 32, 32))[5:],
            num_inference_steps=2,
            output_type="np",
        )
    )
    np.testing.assert_allclose(together[5:], alone.images, atol=1e-5)


def test_texts_and_noise_are_made_when_their_part_is_drawn(pipeline: Pipeline) -> None:
    pipeline.conditioning.cache = RowCache()
    states = pipeline.states(pipeline.plan(Request(prompt=PROMPTS, guidance_scale=1.0, **SETTINGS)))
    first = weakref.ref(next(states))
    assert pipeline.conditioning.cache.misses == 4
    gc.collect()
    assert first() is None, "the generator keeps no state"
    assert isinstance(next(states), DenoiseState)
    assert pipeline.conditioning.cache.misses == 6


def test_a_text_that_cannot_be_encoded_is_found_before_the_first_picture(pipeline: Pipeline) -> None:
    plan = pipeline.plan(Request(prompt=[*PROMPTS, "\ud800"], **SETTINGS))
    with pytest.raises(UsageError, match="not valid Unicode"):
        next(pipeline.draw_each(plan))


def test_steps_of_all_parts_are_counted_together(pipeline: Pipeline) -> None:
    steps = list(pipeline.steps(Request(prompt=PROMPTS, **SETTINGS)))
    assert [(step.index, step.total, step.chunk) for step in steps] == [
        (0, 4, 0),
        (1, 4, 0),
        (2, 4, 1),
        (3, 4, 1),
    ]


def failing(pipeline: Pipeline, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the text encoder fail for every text that has this in it."""
    real = pipeline.conditioning._of_texts

    def some(encoders: Any, texts: Any, **settings: Any) -> Any:
        if lost in texts[0]:
            raise NumericsError("text_encoder: NaN")
        return real(encoders, texts, **settings)

    monkeypatch.setattr(pipeline.conditioning, "_of_texts", some)


def test_a_part_that_is_lost_as_a_whole_does_not_end_the_others(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(pipeline, "cat", monkeypatch)
    output = pipeline.draw(Request(prompt=[*PROMPTS[:4], "dog"], guidance_scale=1.0, **SETTINGS))
    assert [failure.index for failure in output.failures] == [0, 1, 2, 3]
    assert output.images[:4] == [None] * 4 and output.images[4] is not None
    with pytest.raises(NumericsError, match="6 of 6 pictures failed"):
        pipeline.draw(Request(prompt=PROMPTS, guidance_scale=1.0, **SETTINGS))


def run(bundle: Path, folder: Path, *arguments: str) -> int:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    line = [
        "--prompts",
        str(folder / "prompts.txt"),
        "-o",
        str(folder / "p.png"),
        "--steps",
        "1",
        "--seed",
        "5",
    ]
    return main(["run", str(bundle), *line, "--threads", "1", *arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def test_ctrl_c_keeps_the_pictures_that_are_done(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Pipeline.draw_each

    def interrupted(self: Pipeline, plan: Any, **settings: Any) -> Any:
        parts = real(self, plan, **settings)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "draw_each", interrupted)
    assert run(tiny_bundle, tmp_path) == 130
    assert names(tmp_path) == [f"p-{i}.png" for i in range(4)]
    assert "4 of 6 pictures are written; the seed was 5" in capsys.readouterr().err


def test_json_names_the_files_of_all_parts(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_bundle, tmp_path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in result["files"]] == names(tmp_path)
    assert result["seconds"].keys() == {"text", "denoise", "decode"} and result["failures"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 10**9}, "num_inference_steps is 1000000000"),
        ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000"),
        ({"num_images_per_prompt": MAX_PICTURES}, f"6 prompts x {MAX_PICTURES} pictures are"),
        ({"height": 10**400}, "height is 1000"),
        ({"sigmas": [0.5] * 10**5}, "sigmas is"),
    ],
)
def test_numbers_beyond_all_use_are_refused(
    pipeline: Pipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline.plan(Request(**{"prompt": PROMPTS, **changes}))
    assert "pass" in str(caught.value.hint) or "at most" in str(caught.value.hint)
