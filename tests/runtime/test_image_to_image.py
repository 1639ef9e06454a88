"""Image-to-image and inpainting, compared step by step with diffusers from the same seed.

SD3 has pipelines for both in diffusers. Sana has neither, so its reference is the same loop over the checkpoint's own
networks and scheduler in diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SanaSprintImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from pictures import PICTURE_DB, STEP_RELATIVE_L2, Reference
from PIL import Image, ImageDraw
from tiny_sd3 import T5_TOKENS

from ditc.runtime import denoise
from ditc.runtime.bundle.manifest import Tiling
from ditc.runtime.cli import main
from ditc.runtime.errors import UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.prepare import Drawable
from ditc.runtime.request import Request
from ditc.runtime.session import Array
from ditc.runtime.spec import VAE_ENCODER


def _picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((90, 70), Image.Resampling.BICUBIC)


PICTURE, OTHER = _picture(1), _picture(2)
MASK = Image.new("L", PICTURE.size, 0)
ImageDraw.Draw(MASK).ellipse((20, 15, 70, 60), fill=255)


@pytest.fixture(scope="module")
def sd3(sd3_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd3_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sd3_reference(sd3_checkpoint: Path) -> StableDiffusion3Pipeline:
    left_out = (
        {} if (sd3_checkpoint / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    )
    return StableDiffusion3Pipeline.from_pretrained(sd3_checkpoint, dtype=torch.float32, **left_out)


def ours(pipeline: Pipeline, prompt: Any, **arguments: Any) -> tuple[list[Array], Array]:
    latents: list[Array] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(np.array(tensors["latents"]))
        return tensors

    output = pipeline(prompt, callback_on_step_end=keep, output_type="np", **arguments)
    return latents, output.images


def assert_equal_steps(found: list[Array], expected: list[Array]) -> None:
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_l2(a, b) <= STEP_RELATIVE_L2, f"step {step}"


def sd3_theirs(kind: type, reference: StableDiffusion3Pipeline, prompt: Any, **arguments: Any) -> Any:
    pipeline = kind(**reference.components)
    pipeline.set_progress_bar_config(disable=True)
    latents: list[Array] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].numpy().copy())
        return tensors

    images = pipeline(
        prompt, callback_on_step_end=keep, output_type="np", max_sequence_length=T5_TOKENS, **arguments
    ).images
    return latents, images


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("a red cat", {"strength": 0.6, "num_inference_steps": 5}),
        (["a red cat", "a dog"], {"strength": 0.35, "num_inference_steps": 7, "height": 64, "width": 32}),
        ("a red cat", {"strength": 1.0, "num_inference_steps": 3, "guidance_scale": 1.0}),
        ("a red cat", {"strength": 0.5, "num_inference_steps": 4, "num_images_per_prompt": 2}),
    ],
    ids=["one", "two-narrow", "strength-1-unguided", "two-of-one"],
)
def test_sd3_image_to_image_equals_diffusers(
    sd3, sd3_reference, prompt: Any, arguments: dict[str, Any]
) -> None:
    settings = {"height": 64, "width": 64, "guidance_scale": 3.0, **arguments}
    theirs = sd3_theirs(
        StableDiffusion3Img2ImgPipeline,
        sd3_reference,
        prompt,
        image=PICTURE,
        generator=torch.Generator().manual_seed(5),
        **settings,
    )
    # diffusers' pipeline for images has no skip-layer guidance, which this bundle has by default.
    found = ours(sd3, prompt, image=PICTURE, seed=5, skip_layer_guidance_scale=0, **settings)
    assert_equal_steps(found[0], theirs[0])
    assert psnr(found[1], theirs[1]) >= PICTURE_DB


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_sd3_inpainting_equals_diffusers(sd3, sd3_reference, strength: float) -> None:
    settings = {
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
        "num_inference_steps": 5,
        "strength": strength,
    }
    prompts = ["a red cat", "a dog"]
    theirs, _ = sd3_theirs(
        StableDiffusion3InpaintPipeline,
        sd3_reference,
        prompts,
        image=PICTURE,
        mask_image=MASK,
        generator=torch.Generator().manual_seed(5),
        **settings,
    )
    # Only latents are compared: diffusers 0.42.1 decodes inpainted latents without adding the VAE's shift_factor.
    found, _ = ours(
        sd3, prompts, image=PICTURE, mask_image=MASK, seed=5, skip_layer_guidance_scale=0, **settings
    )
    assert_equal_steps(found, theirs)


def sana_theirs(
    reference: Reference,
    prompts: list[str],
    image: Image.Image,
    *,
    strength: float,
    seed: int,
    size: tuple[int, int],
    steps: int = 5,
    guidance_scale: float = 3.0,
    mask: Image.Image | None = None,
) -> tuple[list[Array], Array]:
    """StableDiffusion3Img2ImgPipeline's and ...InpaintPipeline's loop, over Sana's networks and its DPM-Solver++."""
    pipe = reference.pipeline
    count, scale = len(prompts), pipe.vae_scale_factor
    scale = 2 ** (len(pipe.vae.config.encoder_block_out_channels) - 1)
    embeds, embeds_mask, negative, negative_mask = pipe.encode_prompt(
        prompts, True, negative_prompt="", max_sequence_length=12, complex_human_instruction=None
    )
    embeds, embeds_mask = torch.cat([negative, embeds]), torch.cat([negative_mask, embeds_mask])
    pixels = VaeImageProcessor(vae_scale_factor=scale).preprocess(image, height=size[0], width=size[1])
    scheduler, generator = pipe.scheduler, torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    begin = int(max(steps - min(steps * strength, steps), 0))
    scheduler.set_begin_index(begin)
    timesteps, latents_after = scheduler.timesteps[begin:], []
    with torch.no_grad():
        start = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
        start = start.repeat(count, 1, 1, 1)
        noise = torch.randn(start.shape, generator=generator)
        latents = scheduler.add_noise(start, noise, timesteps[:1].repeat(count))
        cells = None
        if mask is not None:
            processor = VaeImageProcessor(
                vae_scale_factor=scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
            )
            cells = torch.nn.functional.interpolate(
                processor.preprocess(mask, height=size[0], width=size[1]), size=tuple(start.shape[2:])
            )
        for i, t in enumerate(timesteps):
            flow = pipe.transformer(
                torch.cat([latents] * 2),
                encoder_hidden_states=embeds,
                encoder_attention_mask=embeds_mask,
                timestep=t.expand(2 * count) * pipe.transformer.config.timestep_scale,
            ).sample
            without, with_text = flow.chunk(2)
            latents = scheduler.step(without + guidance_scale * (with_text - without), t, latents).prev_sample
            if cells is not None:
                kept = start
                if i < len(timesteps) - 1:
                    kept = scheduler.add_noise(start, noise, timesteps[i + 1 : i + 2].repeat(count))
                latents = (1 - cells) * kept + cells * latents
            latents_after.append(latents.numpy().copy())
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents_after, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("mask", [None, MASK], ids=["image-to-image", "inpainting"])
@pytest.mark.parametrize(
    ("prompts", "size", "strength"), [(["cat"], (64, 64), 0.8), (["cat", "a blue dog"], (32, 64), 0.4)]
)
def test_sana_equals_the_same_loop_in_diffusers(
    pipeline: Pipeline,
    reference: Reference,
    prompts: list[str],
    size: tuple[int, int],
    strength: float,
    mask: Any,
) -> None:
    theirs = sana_theirs(reference, prompts, PICTURE, strength=strength, seed=3, size=size, mask=mask)
    settings = {"height": size[0], "width": size[1], "strength": strength, "num_inference_steps": 5}
    found = ours(pipeline, prompts, image=PICTURE, mask_image=mask, seed=3, guidance_scale=3.0, **settings)
    assert_equal_steps(found[0], theirs[0])
    assert psnr(found[1], theirs[1]) >= PICTURE_DB


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        (["cat"], {"num_inference_steps": 2, "strength": 0.6, "height": 64, "width": 64}),
        (["cat", "dog"], {"num_inference_steps": 4, "strength": 0.8, "height": 32, "width": 64}),
    ],
    ids=["one-of-2-steps", "3-of-4-steps"],
)
def test_sprint_image_to_image_equals_diffusers(
    sprint_checkpoint: Path, sprint_bundle: Path, prompts: list[str], settings: dict[str, Any]
) -> None:
    pipe = SanaSprintImg2ImgPipeline.from_pretrained(sprint_checkpoint, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents: list[Array] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].numpy().copy())
        return tensors

    two = settings["num_inference_steps"] == 2
    images = pipe(
        prompts,
        image=PICTURE,
        generator=torch.Generator().manual_seed(5),
        guidance_scale=3.0,
        intermediate_timesteps=1.3 if two else None,
        callback_on_step_end=keep,
        output_type="np",
        use_resolution_binning=False,
        max_sequence_length=12,
        complex_human_instruction=None,
        **settings,
    ).images
    with Pipeline.load(sprint_bundle, threads=1) as pipeline:
        found = ours(pipeline, prompts, image=PICTURE, seed=5, guidance_scale=3.0, **settings)
    assert_equal_steps(found[0], latents)
    assert psnr(found[1], images) >= PICTURE_DB


def test_sprint_inpainting_keeps_the_image_outside_of_the_mask(sprint_bundle: Path) -> None:
    with Pipeline.load(sprint_bundle, threads=1) as pipeline:
        found = pipeline("cat", image=PICTURE, mask_image=MASK, strength=1.0, **SETTINGS).images
        encoded = pipeline.sessions[VAE_ENCODER].run({"image": _pixels(PICTURE)})["latents"]
    outside = np.asarray(MASK.resize((64, 64), Image.Resampling.LANCZOS))[::2, ::2] < 128
    np.testing.assert_allclose(found[0][:, outside], np.asarray(encoded)[0][:, outside], atol=1e-6)


SETTINGS = {"seed": 3, "height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}


def test_every_prompt_may_have_its_own_image_and_mask(pipeline: Pipeline) -> None:
    """diffusers repeats the list of images over num_images_per_prompt; here an image stays with its prompt."""
    both = pipeline(
        ["cat", "dog"], image=[PICTURE, OTHER], mask_image=[MASK, MASK], num_images_per_prompt=2, **SETTINGS
    ).images
    # The same noise, with the other image alone.
    only = pipeline(["cat", "dog"], image=OTHER, mask_image=MASK, num_images_per_prompt=2, **SETTINGS).images
    np.testing.assert_allclose(both[2:], only[2:], atol=1e-5)
    assert relative_l2(both[:2], only[:2]) > 0.01


def test_inpainting_keeps_the_image_outside_of_the_mask(pipeline: Pipeline) -> None:
    found = pipeline("cat", image=PICTURE, mask_image=MASK, strength=1.0, **SETTINGS).images
    encoded = pipeline.sessions[VAE_ENCODER].run({"image": _pixels(PICTURE)})["latents"]
    outside = np.asarray(MASK.resize((64, 64), Image.Resampling.LANCZOS))[::2, ::2] < 128
    np.testing.assert_allclose(found[0][:, outside], np.asarray(encoded)[0][:, outside], atol=1e-6)
    assert relative_l2(found[0][:, ~outside], np.asarray(encoded)[0][:, ~outside]) > 0.1


def _pixels(image: Image.Image) -> Array:
    return VaeImageProcessor(vae_scale_factor=2).preprocess(image, height=64, width=64).numpy()


def test_strangers_with_and_without_images_share_a_batch(pipeline: Pipeline) -> None:
    requests = [
        Request(prompt="cat", image=PICTURE, mask_image=MASK, strength=0.9, **SETTINGS),
        Request(prompt="dog", **SETTINGS),
        Request(prompt="cow", image=OTHER, strength=0.6, **SETTINGS),
    ]
    alone = [pipeline.draw(request).images for request in requests]
    states = [pipeline.start(pipeline.plan(request))[0] for request in requests]
    denoiser = pipeline.sessions["denoiser"]
    finished: dict[int, Array] = {}
    while len(finished) < len(states):
        open_ones = [i for i, state in enumerate(states) if not state.done]
        stepped = denoise.step(denoiser, [states[i] for i in open_ones])
        for i, state in zip(open_ones, stepped, strict=True):
            states[i] = state
            if state.done:
                finished[i] = np.asarray(state.latents)
    for i, expected in enumerate(alone):
        # A batch multiplies larger matrices, whose sums have another order.
        np.testing.assert_allclose(finished[i], expected, atol=1e-5)


def test_pictures_beyond_the_batch_are_drawn_in_parts(pipeline: Pipeline, sd3: Pipeline) -> None:
    """Parts draw the noise that one part for all would draw, also that of the posterior."""
    for each in (pipeline, sd3):
        prompts = [f"cat {i}" for i in range(each.drawable.denoiser.profile["batch"].max + 1)]
        images = [PICTURE, OTHER, *[PICTURE] * (len(prompts) - 2)]
        found = each(prompts, image=images, strength=0.5, **SETTINGS).images
        last = each(prompts[-1:], image=images[-1:], strength=0.5, **SETTINGS).images
        assert found.shape[0] == len(prompts)
        assert relative_l2(found[-1:], last) > 1e-3, "the last picture has noise of its own"


def test_large_images_are_encoded_in_tiles(pipeline: Pipeline, reference: Reference) -> None:
    tiled = pipeline.with_sessions({})
    tiled.tiling = Tiling(tile=48, stride=32)
    vae = reference.pipeline.vae
    vae.enable_tiling(48, 48, 32, 32)
    try:
        theirs = sana_theirs(reference, ["cat"], PICTURE, strength=0.5, seed=3, size=(64, 64))
    finally:
        vae.disable_tiling()
    settings = {"height": 64, "width": 64, "strength": 0.5, "num_inference_steps": 5, "guidance_scale": 3.0}
    found = ours(tiled, ["cat"], image=PICTURE, seed=3, **settings)
    assert_equal_steps(found[0], theirs[0])
    assert psnr(found[1], theirs[1]) >= PICTURE_DB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength is given without an image"),
        ({"mask_image": MASK}, "mask_image is given without an image"),
        ({"image": PICTURE, "strength": 1.5}, "strength is 1.5"),
        ({"image": PICTURE, "strength": float("nan")}, "strength is nan"),
        ({"image": PICTURE, "strength": 0.0}, "strength 0 of 4 steps leaves no step"),
        ({"image": [PICTURE] * 3}, "image holds 3 pictures for 1 prompts"),
        ({"image": PICTURE, "latents": np.zeros((1, 8, 32, 32))}, "image and latents are both given"),
        ({"image": "cat.png"}, "which is no picture"),
    ],
)
def test_images_that_cannot_be_used_are_refused_before_any_work(
    pipeline: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipeline.plan(Request(prompt="cat", num_inference_steps=4, **arguments))
    assert caught.value.hint


def test_a_bundle_without_an_encoder_says_so(pipeline: Pipeline) -> None:
    from ditc.runtime.prepare import make_plan

    drawable = pipeline.drawable
    without = Drawable(
        manifest=drawable.manifest,
        denoiser=drawable.denoiser,
        decoder=drawable.decoder,
        conditioning=drawable.conditioning,
        tiling=None,
    )
    with pytest.raises(UsageError, match="no vae_encoder") as caught:
        make_plan(Request(prompt="cat", image=PICTURE), without)
    assert caught.value.hint


def test_the_command_line_draws_from_a_picture(tiny_bundle: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    PICTURE.save(tmp_path / "photo.png")
    MASK.save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    options = ["--strength", "0.5", "--seed", "3", "--steps", "4", "-o", str(out), "--allow-uniform"]
    assert main(["run", str(tiny_bundle), "cat", *files, *options]) == 0
    expected = pipeline(
        "cat",
        image=PICTURE,
        mask_image=MASK,
        strength=0.5,
        seed=3,
        num_inference_steps=4,
        allow_uniform=True,
    ).images[0]
    with Image.open(out) as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        settings = json.loads(found.text["settings"])
    assert (settings["strength"], settings["mask_image"]) == (0.5, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a nothing", "is not a picture that ditc reads"),
        (None, "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture|cannot be read"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "photo.png"
    if content is not None:
        path.write_bytes(content)
    assert main(["run", str(tmp_path / "no-bundle"), "cat", "--image", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "hint:" in error
