"""What clients ask for becomes a request, or is refused with the name of the argument."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.api.asked import (
    REQUEST_FIELDS,
    VideoForm,
    asked_by_hugging_face,
    asked_by_openai,
    asked_by_video,
)
from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.api.schemas import BundleArguments, GenerationBody, HuggingFaceBody, VideoBody
from ditc.runtime.serving.refusals import Invalid

# Fields of a request that hold pictures, or belong to one: a body does not become these by its names alone.
EDITS = {"image", "mask_image", "strength", "control_image", "controlnet_conditioning_scale"} | {
    "control_guidance_start",
    "control_guidance_end",
}
LIMITS = RequestLimits(max_steps=50, max_pixels=64 * 64, max_images=4, max_prompt_bytes=10, max_timeout=60)


def body(**fields: Any) -> GenerationBody:
    return GenerationBody.model_validate({"prompt": "cat", **fields})


def refusal(header: str = "", **fields: Any) -> Invalid:
    with pytest.raises(Invalid) as found:
        asked_by_openai(body(**fields), LIMITS, header)
    assert found.value.status == 400
    assert found.value.hint
    return found.value


def test_arguments_reach_the_request_under_its_names() -> None:
    asked = asked_by_openai(
        body(n=2, size="64x32", seed=7, guidance_scale=3, sigmas=[1, 0.5], use_resolution_binning=False),
        LIMITS,
    )
    request = asked.request
    assert (request.prompt, request.num_images_per_prompt, request.seed) == ("cat", 2, 7)
    assert (request.width, request.height, request.guidance_scale) == (64, 32, 3)
    assert (request.sigmas, request.use_resolution_binning) == ([1, 0.5], False)


def test_null_is_the_same_as_no_value() -> None:
    names = GenerationBody.model_fields.keys() - {"prompt"}
    assert asked_by_openai(body(**dict.fromkeys(names)), LIMITS) == asked_by_openai(body(), LIMITS)


def test_auto_leaves_the_size_to_the_bundle() -> None:
    request = asked_by_openai(body(size="auto"), LIMITS).request
    assert (request.width, request.height) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "2"},
        {"n": True},
        {"n": 11},
        {"seed": -1},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "1"},
        {"size": "0x64"},
        {"size": "64x64 "},
        {"size": "64X64"},
        {"output_format": "gif"},
        {"partial_images": 4},
        {"latents": [[0.0]]},
        {"image": "http://localhost"},
        {"prompt": "\ud800"},
        {"prompt": ["cat"]},
    ],
)
def test_a_wrong_field_is_named_before_anything_else_is_done(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        body(**fields)
    assert found.value.errors()[0]["loc"][0] in fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "eleven byte"}, "prompt"),
        ({"prompt": "öööööö"}, "prompt"),
        ({"negative_prompt_2": "eleven byte"}, "negative_prompt_2"),
        ({"complex_human_instruction": ["eleven", "byte"]}, "complex_human_instruction"),
        ({"n": 5}, "n"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"sigmas": [0.5] * 51}, "sigmas"),
        ({"size": "65x64"}, "size"),
        ({"timeout": 61.0}, "timeout"),
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"style": "natural"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 1}, "partial_images"),
        ({"size": "64x64", "width": 32}, "width"),
    ],
)
def test_what_is_above_a_bound_or_has_no_meaning_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    assert refusal(**fields).param == param


def test_values_that_clients_send_by_default_are_accepted() -> None:
    asked_by_openai(
        body(quality="auto", style="vivid", background="auto", moderation="auto", user="ann", n=1), LIMITS
    )


def test_the_shorter_of_both_timeouts_counts() -> None:
    assert asked_by_openai(body(timeout=5), LIMITS, "7").timeout == 5
    assert asked_by_openai(body(timeout=5), LIMITS, "2.5").timeout == 2.5
    assert asked_by_openai(body(), LIMITS).timeout is None


@pytest.mark.parametrize("header", ["0", "0.000", "61", "999999999.999999999"])
def test_a_timeout_out_of_its_range_is_refused(header: str) -> None:
    assert refusal(header).param == "timeout"


@pytest.mark.parametrize("parameters", [None, {}, {"timeout": 9.0}])
def test_the_header_with_the_timeout_counts_in_every_form_of_hugging_face(parameters: Any) -> None:
    sent = HuggingFaceBody.model_validate({"inputs": "cat", "parameters": parameters})
    asked = asked_by_hugging_face(sent, LIMITS, model="tiny", format="png", timeout_header="2.5")
    assert asked.timeout == 2.5


def test_the_form_of_hugging_face_asks_for_one_picture() -> None:
    sent = HuggingFaceBody.model_validate(
        {"inputs": "cat", "parameters": {"seed": 7, "width": 64, "height": 32}}
    )
    asked = asked_by_hugging_face(sent, LIMITS, model="tiny", format="jpeg")
    assert (asked.model, asked.format, asked.request.num_pictures) == ("tiny", "jpeg", 1)
    assert (asked.request.seed, asked.request.width, asked.request.height) == (7, 64, 32)


def test_every_argument_of_a_request_is_offered_but_those_that_are_not_for_strangers() -> None:
    renamed = {"prompt", "num_images_per_prompt"}
    kept_back = {"generator", "latents", "output_type"} | EDITS
    of_videos = {"frames", "motion_score"}
    assert of_videos <= VideoBody.model_fields.keys()
    kept_back |= of_videos
    tensors = {name for name in REQUEST_FIELDS if "embeds" in name or name.endswith("attention_mask")}
    offered = BundleArguments.model_fields.keys() - {"timeout"}
    assert offered | renamed | kept_back | tensors == REQUEST_FIELDS
    assert not offered & (kept_back | tensors)


def film(**fields: Any) -> VideoBody:
    return VideoBody.model_validate({"prompt": "cat", **fields})


def test_a_video_is_asked_for_by_frames_or_seconds() -> None:
    asked = asked_by_video(
        film(frames=9, fps=4, motion_score=30, size="64x32", output_format="webp"), LIMITS, "7"
    )
    assert (asked.request.frames, asked.request.motion_score, asked.request.width) == (9, 30, 64)
    assert (asked.video, asked.timeout) == (VideoForm(format="webp", fps=4), 7)
    for seconds in (2.5, "2.5"):
        form = asked_by_video(film(seconds=seconds, output_format="webp"), LIMITS).video
        assert form == VideoForm(format="webp", seconds=2.5)
    with pytest.raises(Invalid, match="seconds is 2, but frames is 9"):
        asked_by_video(film(seconds=2, frames=9), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        *({"seconds": value} for value in ("4s", "", "1e3", "-4", True, -1, 0, 3601, float("inf"))),
        *({"frames": value} for value in ("9", 0, 10_001, 9.5)),
        {"fps": 0},
        {"fps": 1001},
        {"output_format": "png"},
        {"n": 1},
        {"stream": True},
        {"input_reference": "cat.png"},
    ],
)
def test_a_wrong_field_of_a_video_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        film(**fields)
    assert found.value.errors()[0]["loc"][0] in fields


def test_without_pyav_mp4_is_refused_with_what_to_do_and_webp_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditc.runtime.video_files.find_spec", lambda name: None)
    for fields in ({}, {"output_format": "mp4"}):
        with pytest.raises(Invalid, match="no PyAV") as found:
            asked_by_video(film(**fields), LIMITS)
        assert found.value.param == "output_format" and found.value.hint
        assert 'output_format "webp"' in found.value.hint and 'pip install "ditc[video]"' in found.value.hint
    assert asked_by_video(film(output_format="webp"), LIMITS).video == VideoForm(format="webp")


def test_errors_of_the_pipeline_tell_their_argument_by_the_name_that_the_client_knows() -> None:
    picture = asked_by_openai(body(), LIMITS)
    clip = asked_by_video(film(output_format="webp"), LIMITS)
    for message, of_picture, of_clip in (
        ("guidance_scale is 3, but", "guidance_scale", "guidance_scale"),
        ("the bundle cannot", None, None),
        ("image is given, but", "image", "input_reference"),
    ):
        error = UsageError(message, hint="do this")
        for asked, param in ((picture, of_picture), (clip, of_clip)):
            found = asked.invalid(error)
            assert (found.param, found.hint) == (param, "do this")
            assert str(found).startswith(param or message)
