"""Calls that are written for diffusers' pipelines draw what diffusers draws, or are refused with the right hint."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SanaImageToVideoPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaVideoPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from pictures import Reference, assert_same, draw

from ditc.runtime.diffusers_arguments import FOREIGN
from ditc.runtime.errors import DitcError, UsageError
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request, make_request

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "seed": 1}
OF_THE_CALL = {"self", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict"}


@pytest.mark.parametrize(
    "theirs",
    [
        SanaPipeline,
        SanaPAGPipeline,
        SanaSprintPipeline,
        SanaVideoPipeline,
        SanaImageToVideoPipeline,
        StableDiffusion3Pipeline,
        StableDiffusion3PAGPipeline,
    ],
)
def test_every_argument_of_diffusers_pipelines_is_known(theirs: type) -> None:
    own = {field.name for field in fields(Request)} | {"num_videos_per_prompt"}  # of make_request
    assert not inspect.signature(theirs.__call__).parameters.keys() - own - FOREIGN.keys() - OF_THE_CALL


@pytest.mark.parametrize("theirs", [SanaPipeline, StableDiffusion3Pipeline])
def test_the_default_of_every_argument_is_accepted(theirs: type) -> None:
    parameters = inspect.signature(theirs.__call__).parameters
    foreign = {name: one.default for name, one in parameters.items() if name in FOREIGN}
    assert len(foreign) >= 3
    assert make_request(prompt="cat", **foreign) == Request(prompt="cat")


@pytest.mark.parametrize(
    "nothing",
    [
        {"eta": 0.7, "clean_caption": None, "attention_kwargs": {}},
        {"attention_kwargs": {"scale": 1.0}},
        {"callback_on_step_end_tensor_inputs": ["latents"], "return_dict": True},
        {"negative_prompt": None},
    ],
)
def test_values_that_ask_for_nothing_change_nothing(pipeline: Pipeline, nothing: dict[str, Any]) -> None:
    plain = pipeline("cat", output_type="latent", **SETTINGS).images
    np.testing.assert_array_equal(pipeline("cat", output_type="latent", **SETTINGS, **nothing)[0], plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_sequence_length": 1},
        {"max_sequence_length": 5},
        {"complex_human_instruction": None},
        {"complex_human_instruction": ["qq", "r"], "max_sequence_length": 7},
        {
            "guidance_scale": torch.tensor(2.5),
            "height": torch.tensor(64),
            "num_images_per_prompt": np.int8(2),
        },
        {"negative_prompt": ["red"]},
    ],
)
def test_arguments_with_diffusers_meaning_draw_its_picture(
    pipeline: Pipeline, reference: Reference, arguments: dict[str, Any]
) -> None:
    settings = SETTINGS | arguments
    assert_same(draw(pipeline, "a red cat", **settings), reference.draw("a red cat", **settings))


def test_one_text_with_and_without_an_instruction_is_two_rows_of_the_cache(pipeline: Pipeline) -> None:
    """Ids may be equal while other positions of them count."""
    settings = {**SETTINGS, "output_type": "latent", "max_sequence_length": 5}
    with_instruction = pipeline("cat", complex_human_instruction=["ab"], **settings).images
    pipeline("ab" + "cat", **{**settings, "max_sequence_length": 6})
    again = pipeline("cat", complex_human_instruction=["ab"], **settings).images
    np.testing.assert_array_equal(with_instruction, again)


def test_a_generator_of_torch_draws_and_advances_as_in_diffusers(
    pipeline: Pipeline, reference: Reference
) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    mine, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    for _ in range(2):  # the second picture has other noise
        assert_same(
            draw(pipeline, "cat", generator=mine, **settings),
            reference.draw("cat", generator=theirs, **settings),
        )
    several = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    again = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert_same(
        draw(pipeline, ["cat", "dog"], generator=several, **settings),
        reference.draw(["cat", "dog"], generator=again, **settings),
    )


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.double, torch.Tensor.requires_grad_])
def test_tensors_of_torch_are_taken_in_every_type_and_with_gradient(
    pipeline: Pipeline, reference: Reference, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with torch.no_grad():
        embeds, mask, _, _ = reference.pipeline.encode_prompt(
            "red cat", complex_human_instruction=None, max_sequence_length=12
        )
    given = {"prompt_embeds": change(embeds), "latents": change(torch.ones(1, 8, 16, 16) / 3)}
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    ours = draw(pipeline, None, prompt_attention_mask=mask.bfloat16(), **given, **settings)
    same = {name: tensor.detach().float() for name, tensor in given.items()}
    assert_same(ours, reference.draw(None, prompt_attention_mask=mask, **same, **settings))


def test_results_are_taken_apart_like_those_of_diffusers(pipeline: Pipeline) -> None:
    output = pipeline("cat", output_type="np", **SETTINGS)
    for images in (output[0], output["images"], output.to_tuple()[0], *output, *output[:1]):
        assert images is output.images
    as_tuple = pipeline("cat", output_type="np", return_dict=False, **SETTINGS)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    np.testing.assert_array_equal(as_tuple[0], output.images)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"num_inference_step": 3}, "did you mean num_inference_steps?"),
        ({"num_images": 3}, "did you mean num_images_per_prompt?"),
        ({"cfg_scale": 3}, "did you mean guidance_scale?"),
        ({"output_type": "pt"}, r"torch.from_numpy\(images\).permute\(0, 3, 1, 2\)"),
        ({"clean_caption": True}, "clean the text yourself"),
        ({"attention_kwargs": {"scale": 0.5}}, r"pipe\.set_adapters\(NAME, SCALE\)"),
        ({"joint_attention_kwargs": {"scale": np.float32(0.5)}}, r"pipe\.set_adapters\(NAME, SCALE\)"),
        ({"pag_scale": 3.0}, "leave it out"),
        ({"clip_skip": 1}, "the picture of clip_skip=0"),
        ({"callback": print}, "pass callback_on_step_end"),
        ({"control_image": np.zeros((8, 8, 3))}, "leave control_image out"),
        ({"generator": 3}, "pass seed"),
        ({"skip_guidance_layers": [7]}, "skip_guidance_layers"),
        ({"prompt": np.array(["a", "b"])}, r"list\(prompt\)"),
        ({"prompt": {"a": 1}}, r"list\(prompt\)"),
        ({"prompt": iter(["a"])}, r"list\(prompt\)"),
        ({"prompt_2": b"a"}, r"prompt_2.decode\(\)"),
    ],
)
def test_what_is_not_served_is_refused_with_the_right_name_in_the_hint(
    pipeline: Pipeline, arguments: dict[str, Any], hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline(**{"prompt": "cat", "num_inference_steps": 1, **arguments})
    assert caught.match(next(iter(arguments)))
    assert re.search(hint, str(caught.value.hint)), caught.value.hint


ODD_VALUES = (
    *(None, True, -1, 0, 2**70, 0.5, float("nan"), 1j, "", "x", b"x", "\ud800", object(), np.int8(1)),
    *([], {}, [None], ["x"], [["x"]], {"a": 1}, {1}, range(3), iter([1]), Path("x")),
    *(np.array([]), np.array("a"), np.zeros((1, 2)), torch.tensor([]), torch.tensor(2), torch.zeros(1, 2, 3)),
    *(torch.zeros(1, 2, 3, device="meta"), torch.zeros(2, 2).to_sparse(), [torch.Generator()] * 2),
)


@pytest.mark.parametrize(
    "name", [*(field.name for field in fields(Request)), *FOREIGN, *sorted(OF_THE_CALL - {"self"})]
)
def test_odd_values_of_every_argument_draw_or_are_refused_with_a_hint(pipeline: Pipeline, name: str) -> None:
    settings = {**SETTINGS, "prompt": "cat", "num_inference_steps": 1, "output_type": "latent"}
    if name == "generator":
        del settings["seed"]
    refused = 0
    for value in ODD_VALUES:
        try:
            pipeline(**{**settings, name: value})
        except DitcError as error:
            assert error.hint, (value, error)
            refused += 1
    assert refused or name in ("eta", "use_resolution_binning", "allow_uniform", "strict")


def test_arguments_by_position_are_refused_because_their_order_differs(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="'blurry' is given without a name"):
        pipeline("cat", "blurry")
