"""What a callback may return and set between two steps, compared with the same callback in diffusers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from pictures import Reference, draw

from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request

SETTINGS = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, "seed": 1}
NOISE = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "returned",
    [
        [],
        [1],
        "latents",
        5,
        NOISE,
        {3: 4},
        {"prompt_embeds": NOISE},
        {"latents": None},
        {"latents": "noise"},
        {"latents": NOISE[0]},
    ],
)
def test_results_that_cannot_be_used_are_refused(pipeline: Pipeline, returned: Any) -> None:
    with pytest.raises(UsageError, match="callback_on_step_end") as caught:
        pipeline("cat", callback_on_step_end=lambda *_: returned, **SETTINGS)
    assert caught.value.hint


def test_latents_in_bf16_are_taken(pipeline: Pipeline) -> None:
    def replaced(latents: Any) -> Any:
        return pipeline(
            "cat", callback_on_step_end=lambda *_: {"latents": latents}, **SETTINGS, output_type="np"
        )[0]

    given = NOISE.bfloat16().requires_grad_()
    np.testing.assert_array_equal(replaced(given), replaced(given.detach().float().numpy()))


def test_an_interrupted_loop_decodes_what_there_is_as_in_diffusers(
    pipeline: Pipeline, reference: Reference
) -> None:
    def interrupt(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return tensors

    ours = pipeline("cat", callback_on_step_end=interrupt, output_type="np", **SETTINGS).images
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    theirs = reference.pipeline(
        "cat",
        callback_on_step_end=interrupt,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=12,
        **settings,
    ).images
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, draw(pipeline, "cat", **SETTINGS).pictures) < 40


def test_guidance_that_ends_leaves_the_conditional_rows_alone(pipeline: Pipeline) -> None:
    """diffusers' SanaPipeline fails here: a callback can cut its prompt_embeds, but not their mask."""
    seen = []

    def cut(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> None:
        if index == 1:
            pipe._guidance_scale = 0.0
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps))

    prompts, settings = ["cat", "dog"], {**SETTINGS, "output_type": "latent"}
    ours = pipeline(prompts, callback_on_step_end=cut, **settings).images
    assert seen == [(3.0, True, 4), *[(0.0, False, 4)] * 3]

    guided, alone = (
        pipeline.start(pipeline.plan(Request(prompt=prompts, **{**SETTINGS, "guidance_scale": scale})))[0]
        for scale in (3.0, 1.0)
    )
    half = list(pipeline.run([guided]))[1].state
    rest = replace(alone, latents=half.latents, history=half.history, step_index=half.step_index)
    np.testing.assert_array_equal(ours, list(pipeline.run([rest]))[-1].state.latents)


@pytest.mark.parametrize(
    ("name", "value", "guidance_scale", "message"),
    [
        ("_guidance_scale", "3", 3.0, "sets _guidance_scale to '3'"),
        ("_guidance_scale", float("nan"), 3.0, "sets _guidance_scale to nan"),
        ("_guidance_scale", 2.0, 1.0, "sets _guidance_scale to 2, but this run has no unconditional rows"),
        ("_skip_layer_guidance_scale", 2.8, 3.0, "to 2.8, but this run skips no layers"),
        ("_attention_kwargs", {"scale": 0.5}, 3.0, "sets _attention_kwargs, which has no effect"),
        ("scheduler", None, 3.0, "sets scheduler, which has no effect"),
        ("guidance_scale", 2.0, 3.0, "sets guidance_scale, which has no effect"),
    ],
)
def test_attributes_that_cannot_be_changed_are_refused_by_name(
    pipeline: Pipeline, name: str, value: Any, guidance_scale: float, message: str
) -> None:
    def change(pipe: Any, *_: Any) -> None:
        setattr(pipe, name, value)

    settings = {**SETTINGS, "guidance_scale": guidance_scale}
    with pytest.raises(UsageError, match=message) as caught:
        pipeline("cat", callback_on_step_end=change, **settings)
    assert caught.value.hint


def test_attributes_of_a_run_cannot_be_set_on_the_pipeline_itself(pipeline: Pipeline) -> None:
    """A callback that uses the outer variable instead of its argument would otherwise have no effect."""
    for name in ("_guidance_scale", "_interrupt"):
        with pytest.raises(UsageError, match=f"{name} belongs to one run"):
            setattr(pipeline, name, 0)
    with pytest.raises(UsageError, match="scheduler cannot be replaced"):
        pipeline.scheduler = None  # an idiom of diffusers


def test_a_callback_of_diffusers_that_wants_other_tensors_is_refused_before_any_work(
    pipeline: Pipeline,
) -> None:
    with pytest.raises(UsageError, match=r"is \['prompt_embeds', 'pooled_prompt_embeds'\]") as caught:
        pipeline("cat", callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.5), **SETTINGS)
    assert "_guidance_scale = 0" in str(caught.value.hint)
