"""Perturbed-attention guidance of Sana, compared with the unmodified SanaPAGPipeline from the same seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import SanaPAGPipeline, SanaTransformer2DModel
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
)
from pictures import Drawn, assert_same, draw
from tiny_sana import make_pipeline
from torch import Tensor

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families.sana.adapter import ADAPTER
from ditc.export.families.sana.network import SanaConfig, load_sana
from ditc.runtime import denoise
from ditc.runtime.batch import Batch
from ditc.runtime.bundle.manifest import PerturbedAttentionGuidance
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import CONDITIONER, DENOISER

# As a pattern that matches this block alone: diffusers would find "transformer_blocks.1" in transformer_blocks.10, too.
LAYER = r"transformer_blocks\.1\.attn1$"


class Reference:
    """A checkpoint in unmodified diffusers."""

    def __init__(self, checkpoint: Path) -> None:
        self.pipeline = SanaPAGPipeline.from_pretrained(checkpoint, pag_applied_layers=LAYER)
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompt: Any, *, seed: int, **arguments: Any) -> Drawn:
        latents: list[Any] = []

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].numpy().copy())
            return tensors

        fixed = {
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "height": 64,
            "width": 64,
            "max_sequence_length": 12,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        }
        result = self.pipeline(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=keep,
            output_type="np",
            **{**fixed, **arguments},
        )
        return Drawn(latents, result.images)


@pytest.fixture(scope="module")
def reference(pag_checkpoint: Path) -> Reference:
    return Reference(pag_checkpoint)


@pytest.fixture(scope="module")
def pipeline(pag_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(pag_bundle, threads=1) as loaded:
        yield loaded


def test_a_checkpoint_with_layers_is_drawn_with_diffusers_default_scale(pipeline, reference) -> None:
    ours, theirs = draw(pipeline, "a red cat", seed=3), reference.draw("a red cat", seed=3)
    assert_same(ours, theirs)
    without = reference.draw("a red cat", seed=3, pag_scale=0.0)
    assert psnr(theirs.pictures, without.pictures) < 40, "the third row changes nothing, so the test is void"


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("a red cat", {"guidance_scale": 1.0, "pag_scale": 2.0}),
        ("blue", {"pag_scale": 0.0}),
        ("blue", {"pag_scale": -1.0, "guidance_scale": 1.0}),
        ("blue", {"pag_scale": 5.0, "pag_adaptive_scale": 0.01, "num_inference_steps": 6}),
        (["a red cat", "blue"], {"pag_scale": 1.5, "negative_prompt": "green", "height": 96, "width": 32}),
        (["a red cat", "blue", "", "two"], {"guidance_scale": 1.0}),
    ],
    ids=["alone", "off", "below zero", "adaptive", "another shape", "four pictures"],
)
def test_every_kind_of_guidance_matches_diffusers(pipeline, reference, prompt, arguments) -> None:
    assert_same(draw(pipeline, prompt, seed=4, **arguments), reference.draw(prompt, seed=4, **arguments))


def test_rows_are_run_only_where_they_count(pipeline) -> None:
    def rows(**arguments: Any) -> list[int]:
        (state,) = pipeline.start(pipeline.plan(Request(prompt="cat", num_inference_steps=4, **arguments)))
        return [state.row_count(step) for step in range(4)]

    assert rows() == [3, 3, 3, 3]
    assert rows(pag_scale=0) == [2, 2, 2, 2]
    assert rows(guidance_scale=1) == [2, 2, 2, 2]
    assert rows(pag_scale=0, guidance_scale=1) == [1, 1, 1, 1]
    assert rows(guidance_interval=(0.25, 0.75)) == [1, 3, 3, 1]
    falling = rows(pag_scale=1.0, pag_adaptive_scale=0.002)
    assert falling[0] == 3 and falling[-1] == 2


def test_outside_the_guidance_interval_the_picture_follows_the_conditional_rows_alone(pipeline) -> None:
    """The steps before the interval are those of a request without guidance."""
    settings = {"seed": 5, "num_inference_steps": 4}
    late = draw(pipeline, "a red cat", guidance_interval=(0.5, 1), **settings)
    without = draw(pipeline, "a red cat", guidance_scale=1.0, pag_scale=0.0, **settings)
    for step in range(2):
        assert relative_l2(late.latents[step], without.latents[step]) <= 1e-6
    assert relative_l2(late.latents[2], without.latents[2]) > 1e-2
    whole = draw(pipeline, "a red cat", guidance_interval=(0, 1), **settings)
    np.testing.assert_array_equal(whole.pictures, draw(pipeline, "a red cat", **settings).pictures)


def test_requests_with_and_without_share_runs(pipeline) -> None:
    """Mixed in one batch, where rows come and go between steps, each is drawn as alone."""
    settings: list[dict[str, Any]] = [
        {},
        {"pag_scale": 0.0},
        {"guidance_scale": 1.0, "pag_scale": 2.0},
        {"guidance_interval": (0.3, 0.8), "pag_adaptive_scale": 0.002},
    ]
    starts = [
        next(iter(pipeline.start(pipeline.plan(Request(prompt="cat", seed=seed, **given)))))
        for seed, given in enumerate(settings)
    ]
    session = pipeline.sessions[DENOISER]
    mixed, alone = list(starts), list(starts)
    batch = Batch(session)
    for _ in range(4):
        mixed = batch.step(mixed)
        alone = [denoise.step(session, [state])[0] for state in alone]
    for ours, theirs in zip(mixed, alone, strict=True):
        # Only the order of the sum over three rows may differ.
        assert relative_l2(np.asarray(ours.latents), np.asarray(theirs.latents)) <= 1e-5


def test_a_callback_changes_the_scale_of_the_next_steps(pipeline, reference) -> None:
    def change(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._pag_scale = 0.5
        return tensors

    settings = {"num_inference_steps": 4, "output_type": "np"}
    ours = pipeline("a red cat", seed=3, callback_on_step_end=change, **settings).images
    theirs = reference.pipeline(
        "a red cat",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=change,
        guidance_scale=3.0,
        height=64,
        width=64,
        max_sequence_length=12,
        complex_human_instruction=None,
        use_resolution_binning=False,
        **settings,
    ).images
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, draw(pipeline, "a red cat", seed=3).pictures) < 45


@pytest.mark.parametrize(
    "processor", [PAGCFGSanaLinearAttnProcessor2_0, PAGIdentitySanaLinearAttnProcessor2_0]
)
def test_without_qk_norm_the_network_computes_what_diffusers_computes(processor) -> None:
    upstream = make_pipeline(qk_norm=None).transformer
    assert relative_l2(*_both(upstream, processor())) <= 1e-5


def test_with_qk_norm_only_a_processor_with_the_norm_computes_the_same() -> None:
    """diffusers 0.42.1 leaves norm_q and norm_k out in all rows of a perturbed block; NVlabs' code has them."""
    upstream = make_pipeline(qk_norm="rms_norm_across_heads").transformer
    assert relative_l2(*_both(upstream, WithNorm())) <= 1e-5
    assert relative_l2(*_both(upstream, PAGCFGSanaLinearAttnProcessor2_0())) > 1e-3


class WithNorm:
    """PAGCFGSanaLinearAttnProcessor2_0 of diffusers with the norms of q and k."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        *_, perturbed = hidden_states.chunk(3)
        plain = hidden_states[: -len(perturbed)]
        query, key = attn.norm_q(attn.to_q(plain)), attn.norm_k(attn.to_k(plain))
        query, key, value = (
            x.transpose(1, 2).unflatten(1, (attn.heads, -1)) for x in (query, key, attn.to_v(plain))
        )
        value = F.pad(value, (0, 0, 0, 1), value=1.0)
        mixed = value @ F.relu(key).transpose(2, 3) @ F.relu(query)
        mixed = (mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2)
        return attn.to_out[0](torch.cat([mixed, attn.to_v(perturbed)]))


def _both(upstream: SanaTransformer2DModel, processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """The predictions of ditc's network and of diffusers', whose second block has the processor. 1 or 2 plain rows."""
    upstream.transformer_blocks[1].attn1.set_processor(processor)
    plain = 1 if isinstance(processor, PAGIdentitySanaLinearAttnProcessor2_0) else 2
    rows, generator = plain + 1, torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 8, 4, 6, generator=generator)
    text = torch.randn(rows, 5, 24, generator=generator)
    mask = torch.ones(rows, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    time = torch.full((rows,), 400.0)
    config = SanaConfig.from_json({**upstream.config})
    conditioner, denoiser = load_sana(config, upstream.state_dict(), torch.float32, pag_layers=(1,))
    with torch.inference_mode():
        wanted = upstream(latents, text, time, encoder_attention_mask=mask, return_dict=False)[0]
        gate = torch.tensor([0.0] * plain + [1.0])
        found = denoiser(latents, time, *conditioner(text, mask), gate)
    return found.numpy(), wanted.numpy()


def _edited(checkpoint: Path, directory: Path, **settings: Any) -> Any:
    """The plan of a copy of the checkpoint with other settings in its ditc.json; None removes one."""
    copy = Path(shutil.copytree(checkpoint, directory / "copy"))
    values = json.loads((copy / "ditc.json").read_text()) | settings
    (copy / "ditc.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return ADAPTER.plan(open_checkpoint(copy), BuildOptions())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pag_applied_layers": "blocks.0"}, PerturbedAttentionGuidance(layers=(0,), scale=3.0)),
        ({"pag_applied_layers": []}, None),
        (
            {
                "pag_applied_layers": ["transformer_blocks.1.attn1", 0],
                "pag_scale": 2,
                "pag_adaptive_scale": 0.01,
            },
            PerturbedAttentionGuidance(layers=(0, 1), scale=2.0, adaptive_scale=0.01),
        ),
    ],
)
def test_layers_and_scales_come_from_the_checkpoint(pag_checkpoint, tmp_path, settings, wanted) -> None:
    plan = _edited(pag_checkpoint, tmp_path, **settings)
    assert plan.defaults.perturbed_attention_guidance == wanted
    assert plan.step.skip_gate == (wanted is not None)
    assert plan.stages[DENOISER].facts == ({"pag_layers": list(wanted.layers)} if wanted else {})
    assert plan.stages[CONDITIONER].facts == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # diffusers' default layer is the ninth block, which a network of two blocks does not have.
        ({"pag_applied_layers": None}, r"names blocks \[8\], but the network has blocks 0 to 1"),
        ({"pag_applied_layers": "transformer_blocks.(0|1)"}, "names no block"),
        ({"pag_applied_layers": 3}, "the name or number of a layer"),
        ({"pag_applied_layers": [], "pag_scale": 2.0}, "has pag_scale, but no layers"),
    ],
)
def test_layers_that_do_not_exist_are_refused(pag_checkpoint, tmp_path, settings, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        _edited(pag_checkpoint, tmp_path, **settings)


def test_sprint_refuses_perturbed_attention(sprint_checkpoint, sprint_bundle, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="guidance is a part of this network"):
        _edited(sprint_checkpoint, tmp_path, pag_applied_layers="transformer_blocks.1")
    with Pipeline.load(sprint_bundle, threads=1) as sprint:
        with pytest.raises(UsageError, match="no layers for perturbed-attention guidance") as caught:
            sprint("cat", pag_scale=2.0)
        assert "distilled" in str(caught.value.hint)
        with pytest.raises(UsageError, match=r"guidance_interval is 0\.2, 0\.8"):
            sprint("cat", guidance_interval=(0.2, 0.8))


def test_a_bundle_without_layers_refuses_a_scale_and_takes_zero(tiny_bundle) -> None:
    with Pipeline.load(tiny_bundle, threads=1) as plain:
        assert "perturbed_attention_guidance" not in (tiny_bundle / "manifest.json").read_text()
        with pytest.raises(UsageError, match=r"pag_scale is 3\.0") as caught:
            plain("cat", pag_scale=3.0)
        assert "pag_applied_layers" in str(caught.value.hint)
        settings = {"seed": 1, "num_inference_steps": 1, "output_type": "latent"}
        same = plain("cat", pag_scale=0, pag_adaptive_scale=0.0, **settings).images
        np.testing.assert_array_equal(same, plain("cat", **settings).images)
