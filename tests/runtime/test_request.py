"""Requests that cannot be drawn are refused before any work, with the value and a hint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ditc.runtime.errors import UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator

EMBEDS = np.zeros((2, 12, 24), np.float32)
MASK = np.ones((2, 12), np.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, "exactly one of prompt and prompt_embeds"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": 5}, "prompt must be text, got 5"),
        ({"prompt": ["cat", None]}, "prompt must be text"),
        ({"prompt": b"cat"}, "prompt must be text"),
        ({"prompt": "caf\udce9"}, "not valid Unicode"),
        ({"negative_prompt": 5}, "negative_prompt must be text, got 5"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt_2": 5}, "prompt_2 must be text, got 5"),
        ({"prompt_3": ["a", "b"]}, "prompt_3 holds 2 texts for 1 prompts"),
        ({"prompt_2": "dog"}, "prompt_2 is given, but this bundle has only 1 text encoder"),
        ({"negative_prompt_3": "dog"}, "negative_prompt_3 is given, but this bundle has only 1 text encoder"),
        ({"skip_layer_guidance_scale": 2.8}, "2.8, but this bundle's denoiser cannot skip layers"),
        (
            {"skip_layer_guidance_start": 0.0},
            "skip_layer_guidance_start is 0.0, but this bundle's denoiser cannot",
        ),
        ({"skip_layer_guidance_stop": float("nan")}, "skip_layer_guidance_stop is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"num_inference_steps": 2**70}, "num_inference_steps is 1180591620717411303424"),
        ({"return_dict": "no"}, "return_dict is 'no'"),
        ({"output_type": np.zeros(2)}, "output_type is array"),
        ({"complex_human_instruction": np.zeros(2)}, "complex_human_instruction is array"),
        ({"callback_on_step_end_tensor_inputs": [["latents"]]}, "is .*, but a callback gets only latents"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_inference_step": 3}, "there is no argument num_inference_step"),
        ({"max_sequence_length": 13}, "max_sequence_length is 13, but this bundle takes 1 to 12 tokens"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0"),
        ({"complex_human_instruction": "abc"}, "complex_human_instruction is 'abc'"),
        ({"complex_human_instruction": [""]}, r"complex_human_instruction is \[''\], which is empty"),
        (
            {"complex_human_instruction": ["long", "text"]},
            "have 20 tokens, but .* text_encoder takes at most 12",
        ),
        ({"skip_guidance_layers": [7, 8]}, r"skip_guidance_layers is \[7, 8\], but .* cannot skip layers"),
        ({"skip_guidance_layers": 7}, "skip_guidance_layers is 7"),
        ({"callback_on_step_end": 5}, "callback_on_step_end is 5"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            r"is \['prompt_embeds'\], but a callback gets only latents",
        ),
        ({"width": 128.0}, "width is 128.0"),
        ({"seed": 3.0}, "seed is 3.0"),
        ({"num_inference_steps": "3"}, "num_inference_steps is '3'"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt is None"),
        ({"guidance_scale": "3"}, "guidance_scale is '3'"),
        ({"height": 0}, "height is 0"),
        ({"width": -64}, "width is -64"),
        ({"height": 63}, "height 63 is not a multiple of 2 from 32 to 128"),
        ({"width": 4096}, "width 4096"),
        ({"seed": 1, "generator": Generator(1)}, "seed and generator are both given"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"generator": object()}, "generator is <object"),
        ({"generator": [None]}, r"generator is \[None\]"),
        ({"generator": np.random.default_rng(0)}, "generator is Generator"),
        ({"generator": []}, "generators is 0, but the number of pictures is 1"),
        ({"generator": [Generator(1), Generator(2)]}, "generators is 2, but the number of pictures is 1"),
        (
            {"latents": np.zeros((1, 8, 16, 16), np.float32)},
            r"latents have shape \(1, 8, 16, 16\), .* \(1, 8, 32, 32\)",
        ),
        ({"latents": np.full((1, 8, 32, 32), np.nan, np.float32)}, "latents: 8192 values are NaN"),
        ({"latents": "noise"}, r"latents: not an array of numbers \(could not convert string"),
        ({"latents": np.full((1, 8, 32, 32), 1j)}, "its values are complex"),
        ({"latents": torch.zeros(1, 8, 32, 32, device="meta")}, "latents: not an array of numbers"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused(
    pipeline: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(**{"prompt": "cat", "num_inference_steps": 1, **arguments})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": EMBEDS}, "prompt_embeds and prompt_attention_mask go together"),
        ({"prompt_embeds": [[1]]}, r"prompt_embeds is \[\[1\]\]"),
        ({"prompt_embeds": np.float32(1)}, r"prompt_embeds is .*1.0"),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, "pooled_prompt_embeds": EMBEDS[:, 0]},
            "prompt_embeds and prompt_attention_mask go together",
        ),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:, :5]}, r"\(2, 12, 24\).*\(2, 5\)"),
        ({"prompt_embeds": EMBEDS[0], "prompt_attention_mask": MASK[0]}, r"\(12, 24\)"),
        (
            {"prompt_embeds": EMBEDS[..., :7], "prompt_attention_mask": MASK},
            "7 channels, but this model takes 24",
        ),
        (
            {
                "prompt_embeds": np.zeros((2, 40, 24), np.float32),
                "prompt_attention_mask": np.ones((2, 40), int),
            },
            "40 tokens, but this bundle takes 1 to 12",
        ),
        (
            {"prompt_embeds": EMBEDS[:, :0], "prompt_attention_mask": MASK[:, :0]},
            "0 tokens, but this bundle takes 1 to 12",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "prompt_attention_mask": MASK,
                "negative_prompt_embeds": np.concatenate([EMBEDS, EMBEDS[:1]]),
                "negative_prompt_attention_mask": np.concatenate([MASK, MASK[:1]]),
            },
            "negative_prompt_embeds has 3 rows for 2 prompts",
        ),
        (
            {"prompt_embeds": EMBEDS * np.nan, "prompt_attention_mask": MASK},
            "prompt_embeds: 576 values are NaN",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK / 2},
            "prompt_attention_mask has values other than",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "prompt_attention_mask": MASK,
                "negative_prompt": "red",
                "negative_prompt_embeds": EMBEDS,
                "negative_prompt_attention_mask": MASK,
            },
            "negative_prompt and negative_prompt_embeds are both given",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "prompt_attention_mask": MASK,
                "negative_prompt_embeds": EMBEDS[:, :6],
                "negative_prompt_attention_mask": MASK[:, :6],
            },
            "different lengths",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    pipeline: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(num_inference_steps=1, **arguments)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("tokens", "hint"), [(40, "where the model sets no limit of its own"), (0, "at least 1 token")]
)
def test_the_hint_for_a_number_of_tokens_does_not_promise_what_the_model_forbids(
    pipeline: Pipeline, tokens: int, hint: str
) -> None:
    arguments = {"prompt_embeds": np.zeros((1, tokens, 24), np.float32)}
    with pytest.raises(UsageError) as caught:
        pipeline(num_inference_steps=1, prompt_attention_mask=np.ones((1, tokens), int), **arguments)
    assert hint in str(caught.value.hint)


def test_the_hint_for_a_wrong_size_names_one_that_works(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline("cat", height=1001)
    assert caught.value.hint == "use height 128; the default is 64x64"
    assert pipeline.plan(Request(prompt="cat", height=128)).height == 128


def test_values_that_are_left_out_come_from_the_bundle(pipeline: Pipeline) -> None:
    plan = pipeline.plan(Request(prompt="cat"))
    assert (plan.height, plan.width, plan.num_inference_steps, plan.guidance_scale) == (64, 64, 4, 3.0)


def test_one_negative_prompt_is_used_for_all_prompts_and_none_means_the_empty_text() -> None:
    assert Request(prompt=["a", "b"], negative_prompt="c").negative_prompts == ["c", "c"]
    assert Request(prompt=["a", "b"], negative_prompt=None).negative_prompts == ["", ""]
    assert Request(prompt=["a", "b"], negative_prompt=["c", "d"]).negative_prompts == ["c", "d"]


def test_every_encoder_reads_the_first_text_unless_it_has_its_own() -> None:
    request = Request(
        prompt=["a", "b"], prompt_2="x", prompt_3=["y", ""], negative_prompt="n", negative_prompt_3=""
    )
    assert request.texts(3, negative=False) == [("a", "x", "y"), ("b", "x", "")]
    assert request.texts(3, negative=True) == [("n", "n", "n"), ("n", "n", "n")]
    assert request.texts(1, negative=False) == [("a",), ("b",)]
