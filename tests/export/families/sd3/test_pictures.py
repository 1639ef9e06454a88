"""Pictures of SD3 checkpoints, compared with the unmodified StableDiffusion3Pipeline from the same seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from pictures import Drawn, assert_same, draw
from PIL import Image
from tiny_sd3 import T5_TOKENS, make_checkpoint

from ditc.export.checkpoint.scheduler_config import scheduler_params
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime import denoise, step_contract
from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.rng import Generator
from ditc.runtime.schedulers import coefficient_table
from ditc.runtime.session import Session, Tensor
from ditc.runtime.spec import DENOISER

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# The settings in the checkpoint's ditc.json, as arguments of diffusers' pipeline.
SKIP = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_scale": 2.8,
    "skip_layer_guidance_start": 0.01,
    "skip_layer_guidance_stop": 0.8,
}


class Reference:
    """A checkpoint in unmodified diffusers."""

    def __init__(self, checkpoint: Path) -> None:
        t5 = (checkpoint / "text_encoder_3").is_dir()
        left_out = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32, **left_out)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompt: Any, *, seed: int, **arguments: Any) -> Drawn:
        latents: list[Any] = []

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].numpy().copy())
            return tensors

        fixed = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": T5_TOKENS}
        result = self.pipeline(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=keep,
            output_type="np",
            **{**fixed, **arguments},
        )
        return Drawn(latents, result.images)


@pytest.fixture(scope="module")
def reference(sd3_checkpoint: Path) -> Reference:
    return Reference(sd3_checkpoint)


@pytest.fixture(scope="module")
def pipeline(sd3_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd3_bundle, threads=1) as loaded:
        yield loaded


def test_skip_layer_guidance_is_on_where_the_checkpoint_says_so(pipeline, reference) -> None:
    ours, theirs = draw(pipeline, "a red cat", seed=3), reference.draw("a red cat", seed=3, **SKIP)
    assert_same(ours, theirs)
    without = reference.draw("a red cat", seed=3)
    assert psnr(theirs.pictures, without.pictures) < 40, "the third row changes nothing, so the test is void"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"skip_layer_guidance_scale": 0.0}, {}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0, **SKIP}),
        ({"skip_layer_guidance_stop": 0.5}, {**SKIP, "skip_layer_guidance_stop": 0.5}),
        (
            {"num_inference_steps": 3, "guidance_scale": 6.5},
            {"num_inference_steps": 3, "guidance_scale": 6.5, **SKIP},
        ),
    ],
    ids=["guidance alone", "no guidance", "another window", "other steps"],
)
def test_every_kind_of_guidance_matches_diffusers(pipeline, reference, given, wanted) -> None:
    assert_same(draw(pipeline, "a red cat", seed=4, **given), reference.draw("a red cat", seed=4, **wanted))


@pytest.mark.parametrize(("height", "width"), [(112, 96), (48, 128)])
def test_other_sizes_crop_the_position_embedding_as_in_diffusers(pipeline, reference, height, width) -> None:
    """An odd number of patches per side, such as 7, has no exact centre in an even embedding: the crop is rounded."""
    size = {"height": height, "width": width}
    assert_same(draw(pipeline, "blue", seed=5, **size), reference.draw("blue", seed=5, **size, **SKIP))


@pytest.mark.parametrize(
    ("scheduler", "given"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=4.0), {}),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"), {"mu": 2.5}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": [1.0, 0.7, 0.2]}),
        (DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True), {}),
        (UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True, solver_order=1), {"height": 96}),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), {"skip_layer_guidance_stop": 0.5}),
    ],
    ids=["size", "mu", "sigmas", "dpmsolver", "unipc", "heun"],
)
def test_the_size_shifts_the_schedule_where_the_scheduler_says_so(
    pipeline, reference, scheduler, given
) -> None:
    config = json.loads(scheduler.to_json_string())
    released = pipeline.manifest, reference.pipeline.scheduler
    pipeline.manifest = replace(pipeline.manifest, scheduler=scheduler_params(config, passes_mu=True))
    reference.pipeline.scheduler = scheduler
    try:
        ours = draw(pipeline, "a red cat", seed=6, **given)
        assert_same(ours, reference.draw("a red cat", seed=6, **{**SKIP, **given}))
    finally:
        pipeline.manifest, reference.pipeline.scheduler = released


def test_several_prompts_with_several_pictures_each_match_diffusers(pipeline, reference) -> None:
    prompts, arguments = ["a red cat", "blue"], {"num_images_per_prompt": 2}
    ours = draw(pipeline, prompts, seed=6, **arguments)
    assert_same(ours, reference.draw(prompts, seed=6, **arguments, **SKIP))


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("cat", {"prompt_2": "a dog", "negative_prompt": "blue", "negative_prompt_3": "red"}),
        ("cat", {"prompt_2": "", "prompt_3": [], "negative_prompt": "blue", "negative_prompt_3": ""}),
        ("cat", {"prompt_3": [""], "negative_prompt": ["blue"], "negative_prompt_3": [""]}),
        (["cat", "blue"], {"prompt_2": ["", "a dog"], "prompt_3": ["red", ""]}),
        (["cat", "blue"], {"negative_prompt": ["a", "b"], "negative_prompt_2": ["", "red"]}),
        ("cat", {"max_sequence_length": 40}),
        ("cat", {"max_sequence_length": 3}),
    ],
)
def test_texts_reach_each_encoder_as_in_diffusers(pipeline, reference, prompt, texts) -> None:
    """An argument that is empty as a whole stands for the first text; an empty text in a list does not."""
    assert_same(draw(pipeline, prompt, seed=7, **texts), reference.draw(prompt, seed=7, **texts, **SKIP))


@pytest.mark.parametrize("scales", [(0.0, 2.8), (6.0, 2.8), (3.0, 1.0)], ids=["cut-off", "guidance", "skip"])
def test_scales_that_a_callback_sets_act_in_the_next_steps_as_in_diffusers(
    pipeline, reference, scales
) -> None:
    def change(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale, pipe._skip_layer_guidance_scale = scales
            for name in tensors.keys() - {"latents"} if not scales[0] else ():
                tensors[name] = tensors[name][-1:]
        return tensors

    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    ours = pipeline("a red cat", seed=3, callback_on_step_end=change, **settings).images
    theirs = reference.pipeline(
        "a red cat",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "pooled_prompt_embeds"],
        max_sequence_length=T5_TOKENS,
        **settings,
        **SKIP,
    ).images
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, draw(pipeline, "a red cat", seed=3).pictures) < 40


def test_layers_to_skip_are_taken_if_the_denoiser_skips_them(pipeline, reference) -> None:
    ours = draw(pipeline, "cat", seed=3, skip_guidance_layers=[1])
    assert_same(ours, reference.draw("cat", seed=3, **SKIP))
    off = draw(pipeline, "cat", seed=3, skip_guidance_layers=[])
    assert_same(off, reference.draw("cat", seed=3))
    with pytest.raises(UsageError, match=r"is \[0\], but .* is compiled to skip \[1\]"):
        pipeline("cat", skip_guidance_layers=[0])
    with pytest.raises(UsageError, match="this bundle has 3 text encoders"):
        pipeline("cat", complex_human_instruction=["Draw this:"])


def test_a_long_text_is_cut_where_diffusers_cuts_it_and_a_warning_says_so(
    pipeline, reference, caplog
) -> None:
    text = " ".join(["red cat,"] * 40) + " zebra"
    with caplog.at_level(logging.WARNING, logger="ditc"):
        ours = draw(pipeline, text, seed=8)
    assert_same(ours, reference.draw(text, seed=8, **SKIP))
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("ditc")]
    assert [f"room for {n} tokens" in line for n, line in zip((77, 77, 16), warnings, strict=True)] == [
        True
    ] * 3
    assert all(line.rstrip("'").endswith("zebra") and "</w>" not in line for line in warnings)


def test_embeddings_that_diffusers_encoded_draw_the_same_picture(pipeline, reference) -> None:
    with torch.inference_mode():
        embeds, negative, pooled, negative_pooled = reference.pipeline.encode_prompt(
            "a red cat", None, None, max_sequence_length=T5_TOKENS
        )
    given = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    ours = draw(pipeline, None, seed=9, **{name: tensor.numpy() for name, tensor in given.items()})
    assert_same(ours, reference.draw(None, seed=9, **given, **SKIP))


def test_embeddings_of_another_length_match_diffusers_too(pipeline, reference) -> None:
    """Only CLIP's 77 tokens, without T5's: SD3's first demo had fewer tokens too."""
    with torch.inference_mode():
        embeds, negative, pooled, negative_pooled = reference.pipeline.encode_prompt(
            "a red cat", None, None, max_sequence_length=T5_TOKENS
        )
    given = {
        "prompt_embeds": embeds[:, :77],
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative[:, :77],
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    ours = draw(pipeline, None, seed=9, **{name: tensor.numpy() for name, tensor in given.items()})
    assert_same(ours, reference.draw(None, seed=9, **given, **SKIP))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": np.zeros((1, 93, 40))}, "prompt_embeds and pooled_prompt_embeds go together"),
        (
            {"prompt_embeds": np.zeros((1, 93, 41)), "pooled_prompt_embeds": np.zeros((1, 20))},
            "prompt_embeds have 41 channels, but this model takes 40",
        ),
        (
            {"prompt_embeds": np.zeros((1, 700, 40)), "pooled_prompt_embeds": np.zeros((1, 20))},
            "700 tokens, but this bundle takes 1 to 589",
        ),
        (
            {"prompt_embeds": np.zeros((1, 93, 40)), "pooled_prompt_embeds": np.zeros((1, 1, 20, 1))},
            r"pooled_prompt_embeds is \(1, 20, 1\)",
        ),
        (
            {
                "prompt_embeds": np.zeros((1, 93, 40)),
                "pooled_prompt_embeds": np.zeros((1, 20)),
                "prompt_3": "cat",
            },
            "prompt_3 and prompt_embeds are both given",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(pipeline, arguments, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(**arguments)
    assert caught.value.hint


class Counting:
    """The denoiser's session, which also records the number of rows of each run."""

    def __init__(self, session: Session) -> None:
        self.session, self.spec, self.device = session, session.spec, session.device
        self.rows: list[int] = []

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        self.rows.append(feeds[step_contract.ROW_OF].shape[0])
        return self.session.run(feeds)

    def close(self) -> None:
        """Do nothing: the session belongs to another pipeline."""


def test_the_third_row_is_computed_in_its_window_only(pipeline) -> None:
    counting = Counting(pipeline.sessions[DENOISER])
    watched = pipeline.with_sessions({DENOISER: counting})
    watched("a red cat", seed=1)
    assert counting.rows == [2, 3, 3, 3, 2]


class Looping(Counting):
    """A session that runs several steps of one shape in one launch, as sessions on a GPU do."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.launches: list[list[int]] = []

    def run_loop(self, feeds: Any, per_step: Any, *, carry: Any, keep: Any) -> dict[str, Tensor]:
        self.launches.append([step[step_contract.GUIDANCE_WEIGHTS].shape[1] for step in per_step])
        feeds, kept = dict(feeds), []
        for step in per_step:
            outputs = self.session.run({**feeds, **step})
            feeds |= {taken: outputs[given] for given, taken in carry.items()}
            kept.append({name: outputs[name] for name in keep})
        return {**outputs, **{name: np.stack([one[name] for one in kept]) for name in keep}}


def test_a_launch_of_many_steps_ends_where_the_number_of_rows_changes(pipeline) -> None:
    looping = Looping(pipeline.sessions[DENOISER])
    launching = pipeline.with_sessions({DENOISER: looping})
    request = {"seed": 1, "output_type": "np", "num_inference_steps": 6}
    picture = launching("a red cat", **request).images
    assert looping.launches == [[3, 3, 3, 3]], "the single steps before and after need no loop"
    assert looping.rows == [2, 2]
    np.testing.assert_array_equal(picture, pipeline("a red cat", **request).images)


def test_requests_with_and_without_skipped_layers_share_a_batch(pipeline) -> None:
    requests = [
        Request(prompt="a red cat", seed=1),
        Request(prompt="blue", seed=2, guidance_scale=1.0),
        Request(prompt="a cat", seed=3, skip_layer_guidance_scale=0.0, num_inference_steps=4),
    ]
    states = [pipeline.start(pipeline.plan(request))[0] for request in requests]
    alone = [denoise.step(pipeline.sessions[DENOISER], [state])[0] for state in states]
    for _ in range(2):  # the first request skips layers in its second step
        together = denoise.step(pipeline.sessions[DENOISER], states)
        alone = [denoise.step(pipeline.sessions[DENOISER], [state])[0] for state in states]
        for one, of_many in zip(alone, together, strict=True):
            np.testing.assert_allclose(of_many.latents, one.latents, rtol=1e-4, atol=1e-5)
        states = together


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-large"])
@pytest.mark.parametrize("t5", [True, False], ids=["with T5", "without T5"])
def test_every_variant_draws_the_picture_of_diffusers_with_and_without_t5(tmp_path, variant, t5) -> None:
    """The pipeline runs over PyTorch sessions. The bundle of one variant covers the graphs."""
    checkpoint = make_checkpoint(tmp_path / variant, variant, t5=t5)
    pipeline = TorchModel(checkpoint).pipeline
    ours = draw(pipeline, ["a red cat", "blue"], seed=2, max_sequence_length=T5_TOKENS)
    assert_same(ours, Reference(checkpoint).draw(["a red cat", "blue"], seed=2))
    if not t5:
        with pytest.raises(UsageError, match="is 77, but this bundle was built for 16"):
            pipeline.plan(Request(prompt="cat", max_sequence_length=77))


def test_turbo_takes_its_four_steps_without_guidance(tmp_path) -> None:
    checkpoint = make_checkpoint(tmp_path / "turbo", "sd3.5-large-turbo")
    ours = draw(TorchModel(checkpoint).pipeline, "a red cat", seed=2)
    theirs = Reference(checkpoint).draw("a red cat", seed=2, num_inference_steps=4, guidance_scale=1.0)
    assert_same(ours, theirs)


def test_skip_layer_guidance_on_a_model_without_it_is_refused(tmp_path) -> None:
    pipeline = TorchModel(make_checkpoint(tmp_path / "medium", "sd3-medium")).pipeline
    with pytest.raises(UsageError, match="cannot skip layers") as caught:
        pipeline.plan(Request(prompt="cat", skip_layer_guidance_scale=2.8))
    assert "skip_guidance_layers" in str(caught.value.hint)


def test_a_window_that_ends_before_it_begins_is_refused(pipeline) -> None:
    with pytest.raises(UsageError, match=r"starts at 0\.5 of the steps and stops at 0\.2") as caught:
        pipeline("cat", skip_layer_guidance_start=0.5, skip_layer_guidance_stop=0.2)
    assert "skip_layer_guidance_scale 0" in str(caught.value.hint)
    pipeline("cat", seed=1, skip_layer_guidance_stop=0.0, skip_layer_guidance_scale=0.0)


def test_a_window_for_guidance_that_is_off_gives_a_warning(pipeline, caplog) -> None:
    pipeline.plan(Request(prompt="cat", skip_layer_guidance_scale=0.0, skip_layer_guidance_stop=0.5))
    assert "skip_layer_guidance_scale turns it on" in caplog.text


def test_a_size_beyond_the_position_embedding_is_refused_with_a_size_that_works(pipeline) -> None:
    with pytest.raises(UsageError, match="height 208 is not a multiple of 16 from 32 to 128") as caught:
        pipeline("cat", height=208)
    assert "height 128" in str(caught.value.hint)


def test_a_callers_generator_and_latents_match_diffusers_too(pipeline, reference) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)
    theirs = reference.draw("cat", seed=0, latents=torch.from_numpy(noise), **SKIP)
    assert_same(draw(pipeline, "cat", latents=noise), theirs)
    ours = draw(pipeline, "cat", generator=Generator(11))
    assert_same(ours, reference.draw("cat", seed=11, **SKIP))


def test_the_bundle_reproduces_the_twice_shifted_sigmas_by_itself(pipeline, reference) -> None:
    """The bundle has the parameters between the two shifts, so it does not depend on the installed diffusers."""
    for steps in (4, 28):
        reference.pipeline.scheduler.set_timesteps(steps)
        table = coefficient_table(pipeline.manifest.scheduler, steps)
        np.testing.assert_allclose(table.sigmas, reference.pipeline.scheduler.sigmas.numpy(), rtol=1e-6)
    once = replace(pipeline.manifest.scheduler, sigma_min=0.001)
    last = [coefficient_table(params, 28).sigmas[-2] for params in (once, pipeline.manifest.scheduler)]
    assert abs(last[0] - last[1]) > 5e-3, "a single shift would pass too, so the test is void"


def test_the_command_draws_and_inspect_names_the_skipped_layers(
    sd3_bundle, pipeline, tmp_path, capsys
) -> None:
    out = tmp_path / "cat.png"
    arguments = ["--seed", "3", "--skip-layer-guidance-scale", "0", "--threads", "1"]
    assert main(["run", str(sd3_bundle), "a red cat", "-o", str(out), *arguments]) == 0
    (wanted,) = pipeline("a red cat", seed=3, skip_layer_guidance_scale=0.0).images
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(wanted))
    assert main(["inspect", str(sd3_bundle)]) == 0
    assert (
        "skip-layer guidance: layers 1, scale 2.8, from 0.01 to 0.8 of the steps" in capsys.readouterr().out
    )


def test_the_command_takes_a_text_per_encoder_and_the_window_and_stores_them_in_the_picture(
    sd3_bundle, pipeline, tmp_path
) -> None:
    texts = {
        "negative_prompt": "blue",
        "prompt_2": "a dog",
        "prompt_3": "a red dog",
        "negative_prompt_2": "red",
        "negative_prompt_3": "cat",
    }
    window = {
        "skip_layer_guidance_scale": 2.0,
        "skip_layer_guidance_start": 0.1,
        "skip_layer_guidance_stop": 0.5,
    }
    out = tmp_path / "cat.png"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**texts, **window}.items()]
    arguments = ["--seed", "3", "--threads", "1", *options]
    assert main(["run", str(sd3_bundle), "a red cat", "-o", str(out), *arguments]) == 0
    picture = Image.open(out)
    for names in (texts, window):  # without either of them the picture is another
        kept = {name: value for name, value in {**texts, **window}.items() if name not in names}
        (other,) = pipeline("a red cat", seed=3, **kept).images
        assert not np.array_equal(np.asarray(picture), np.asarray(other))
    (wanted,) = pipeline("a red cat", seed=3, **texts, **window).images
    assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    carried = picture.text
    assert {name: carried[name] for name in texts} == texts
    assert window.items() <= json.loads(carried["settings"]).items()
