"""What the page shows of a request, without a browser."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.http.keys import KeyLimits
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds
from ditc.runtime.serving.ui import html
from ditc.runtime.serving.ui.draw import View, views
from ditc.runtime.serving.ui.form import form_of
from ditc.runtime.serving.ui.visitors import Visitors
from ditc.runtime.step_contract import GuidanceMode

LIMITS = RequestLimits(max_steps=20, max_images=2, max_prompt_bytes=100)
ASKED = Request(prompt="red <cat>", seed=3, num_inference_steps=4)


@pytest.fixture(scope="module")
def models(tiny_bundle: Path) -> Iterator[Models]:
    models = Models({"tiny": tiny_bundle}, admission=Admission(Bounds()), warm_up_seconds=0.0)
    yield models
    models.close()


Show = Callable[..., list[View]]


@pytest.fixture
def show(models: Models) -> Show:
    def all_views(request: Any, name: str = "tiny", caller: Caller | None = None) -> list[View]:
        visitors, wanted = Visitors(), request if callable(request) else lambda: request
        with visitors.streaming("v"):
            shown = views(
                models,
                name,
                wanted,
                limits=LIMITS,
                caller=caller or Caller("alice"),
                visitors=visitors,
                visit="v",
            )
            return list(shown)

    return all_views


def test_the_last_view_holds_the_files_of_all_pictures(show: Show, tiny_bundle: Path) -> None:
    last = show(replace(ASKED, num_images_per_prompt=2))[-1]
    files = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", last.html)]
    drawn = [Image.open(io.BytesIO(file)) for file in files]
    with Pipeline.load(tiny_bundle, threads=1) as pipeline:
        alone = pipeline.draw(replace(ASKED, num_images_per_prompt=2)).images
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in alone]
    assert last.ended and last.seed == 3
    assert {picture.info["prompt"] for picture in drawn} == {"red <cat>"}
    assert 'data-name="ditc-3-1.png"' in last.html and 'data-name="ditc-3-2.png"' in last.html


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"prompt": "x" * 101}, "at most 100 bytes"),
        ({"num_inference_steps": 21}, "at most 20 steps"),
        ({"num_images_per_prompt": 3}, "at most 2 pictures"),
        ({"height": 2**14, "width": 2**14}, "at most"),
        ({"height": 65}, "height 65"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": 7}, "prompt must be text"),
    ),
)
def test_the_form_has_the_limits_of_the_api(show: Show, changes: dict[str, Any], words: str) -> None:
    last = show(replace(ASKED, **changes))[-1]
    assert last.ended and "ditc-problem" in last.html and words in last.html.lower()


def test_a_form_with_values_of_other_types_is_refused(show: Show) -> None:
    assert "form is not filled in" in show(lambda: Request(prompt="x", seed=int("many")))[-1].html


def test_what_the_page_draws_counts_for_the_key(show: Show) -> None:
    small = Caller("bob", limits=KeyLimits(pixel_steps_per_minute=4 * 64 * 64))
    assert show(ASKED, caller=small)[-1].seed == 3
    assert "per minute" in show(ASKED, caller=small)[-1].html


def test_an_unknown_model_is_refused(show: Show) -> None:
    assert "does not exist" in show(ASKED, name="../secret")[-1].html


def test_errors_that_are_not_for_clients_are_not_shown(show: Show, models: Models, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("/home/secret")

    monkeypatch.setattr(models, "using", fail)
    last = show(ASKED)[-1]
    assert "server has failed" in last.html and "secret" not in last.html


def test_nothing_is_drawn_where_nobody_reads(models: Models) -> None:
    class Nobody(Visitors):
        def is_streaming(self, visit: str, *, wait: float = 0.0) -> bool:
            return False

    assert (
        list(
            views(
                models,
                "tiny",
                lambda: ASKED,
                limits=LIMITS,
                caller=Caller("alice"),
                visitors=Nobody(),
                visit="v",
            )
        )
        == []
    )


def test_closing_the_views_cancels_the_request(models: Models) -> None:
    visitors = Visitors()
    with visitors.streaming("v"), models.using("tiny") as model:
        shown = views(
            models, "tiny", lambda: ASKED, limits=LIMITS, caller=Caller("alice"), visitors=visitors, visit="v"
        )
        assert "Opening" in next(shown).html and "Waiting" in next(shown).html
        (job,) = model.scheduler._queue.jobs.values() or [None]
        shown.close()
        assert job is None or job.cancelled or job.end is not None


def test_texts_are_escaped() -> None:
    shown = html.problem("<script>", "<b>") + html.progress("<i>") + html.done("<u>")
    shown += html.pictures([html.Shown(png=b"", caption="<s>", name='"><x>')])
    assert not re.search(r"<(script|b>.*<b>|i|u|s|x)>", shown)


def test_the_form_offers_what_the_bundle_can_draw(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    form = form_of(manifest)
    assert form.has_guidance and form.has_negative_prompt and form.previews
    assert form.defaults.height in form.height and form.defaults.width in form.width
    binned = replace(
        manifest, defaults=replace(manifest.defaults, bins=((64, 64), (32, 96), (10_000, 10_000)))
    )
    assert form_of(binned).sizes == tuple(size for size in ((32, 96), (64, 64)) if size[0] in form.height)
    without = form_of(replace(manifest, guidance=GuidanceMode.NONE))
    assert not without.has_guidance and not without.has_negative_prompt
