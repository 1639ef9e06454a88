"""Parity itself under test: every planted defect is caught and its place is named; without the defect it passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO_CHECKPOINT
from planted import (
    PROMPTS,
    SETTINGS,
    TWO_CASES,
    ActiveHistory,
    LateTable,
    NanAt,
    StaleHistory,
    StrongerGuidance,
    SwappedRows,
    context_of,
    failures,
    modulated,
    module_of,
    patch_forward,
    patch_pipeline,
    permuted_channels,
    reorder_ffn,
    replace_tokenizers,
    sentencepiece_model,
    swapped_scale_and_shift,
    torch_candidate,
    without_gate,
    without_padding,
)
from transformers import GemmaTokenizer

from ditc.parity.cases import Case
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Result, Verdict
from ditc.runtime.spec import CONDITIONER, DENOISER, VAE_DECODER
from ditc.runtime.tolerances import Level

BLOCK = "network.transformer_blocks"


@dataclass(frozen=True)
class Defect:
    """What is planted, the level that must find it, and what the result must name."""

    plant: Callable[[TorchModel], object]
    stage: str
    module: str
    level: Level = Level.STAGE
    cause: str = ""


def _transpose(model: TorchModel) -> None:
    weight = module_of(model, DENOISER, f"{BLOCK}.1.attn1.to_q").weight
    with torch.no_grad():
        weight.copy_(weight.T.clone())


def _zero(model: TorchModel) -> None:
    with torch.no_grad():
        module_of(model, DENOISER, f"{BLOCK}.0.ff.conv_point").weight.zero_()


def _ignore_mask(model: TorchModel) -> None:
    module = module_of(model, CONDITIONER)
    forward = type(module).forward

    def without_mask(self, text_embeds, text_mask):  # type: ignore[no-untyped-def]
        kv, bias = forward(self, text_embeds, text_mask)
        return kv, torch.zeros_like(bias)

    patch_forward(module, without_mask)


def _grey(latents: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = latents.shape
    return torch.full((batch, 3, 2 * height, 2 * width), 0.25)


def _other_shift(model: TorchModel) -> None:
    manifest = model.pipeline.manifest
    model.pipeline.manifest = replace(manifest, scheduler=replace(manifest.scheduler, shift=6.0))


def _pipeline(kind):  # type: ignore[no-untyped-def]
    return lambda model: patch_pipeline(model, kind)


DEFECTS = {
    "adaLN scale and shift swapped": Defect(
        lambda t: patch_forward(module_of(t, DENOISER, f"{BLOCK}.0"), modulated(swapped_scale_and_shift)),
        DENOISER,
        f"{BLOCK}.0",
    ),
    "gate dropped": Defect(
        lambda t: patch_forward(module_of(t, DENOISER, f"{BLOCK}.1"), modulated(without_gate)),
        DENOISER,
        f"{BLOCK}.1",
    ),
    # The norm of k is skipped, because the scale of q cancels between numerator and denominator of linear attention.
    "qk-norm skipped": Defect(
        lambda t: patch_forward(module_of(t, DENOISER, f"{BLOCK}.0.attn1.norm_k"), lambda self, x: x),
        DENOISER,
        f"{BLOCK}.0.attn1.norm_k",
    ),
    "one weight transposed": Defect(_transpose, DENOISER, f"{BLOCK}.1.attn1.to_q"),
    "one weight zeroed": Defect(_zero, DENOISER, f"{BLOCK}.0.ff.conv_point"),
    "depthwise convolution without padding": Defect(
        lambda t: patch_forward(module_of(t, DENOISER, f"{BLOCK}.0.ff.conv_depth"), without_padding),
        DENOISER,
        f"{BLOCK}.0.ff.conv_depth",
    ),
    "channels permuted in unpatchify": Defect(
        lambda t: module_of(t, DENOISER, "network").register_forward_hook(permuted_channels),
        DENOISER,
        "network",
    ),
    "VAE scale missing": Defect(
        lambda t: setattr(module_of(t, VAE_DECODER), "scaling_factor", 1.0), VAE_DECODER, ""
    ),
    "text mask ignored": Defect(_ignore_mask, CONDITIONER, ""),
    "text mask ignored, seen from the loop": Defect(
        _ignore_mask, "pipeline", "what the denoiser is fed", Level.STEP, "missing mask"
    ),
    "conditional and unconditional swapped": Defect(
        _pipeline(SwappedRows), "pipeline", "what the denoiser is fed", Level.STEP, "swapped CFG order"
    ),
    "guidance off by one": Defect(
        _pipeline(StrongerGuidance),
        "pipeline",
        "what the denoiser is fed",
        Level.STEP,
        "guidance scale is 4, but 3",
    ),
    "wrong flow shift": Defect(
        _other_shift, "pipeline", "what the denoiser is fed", Level.STEP, "shifted sigmas"
    ),
    "wrong flow shift, seen in the manifest": Defect(
        _other_shift, "scheduler", "", Level.GRAPH, "flow shift is 2 times"
    ),
    "sigma table off by one": Defect(
        _pipeline(LateTable), "pipeline", "what the denoiser is fed", Level.STEP, "shifted sigmas"
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught_and_named(name, tiny_checkpoint, healthy, record_property) -> None:
    defect = DEFECTS[name]
    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint, defect.plant))
    found = failures(context, defect.level)
    assert found, f"{name} passes"
    without = healthy(defect.level, defect.stage)
    record_property("without the defect", without.value)
    assert found[0].stage == defect.stage
    assert without.value <= without.bound, f"without the defect: {without.value}"
    assert found[0].value is None or found[0].value > 10 * without.bound, (found[0].value, without.value)
    _check_named(found[0], defect)


def _check_named(result: Result, defect: Defect) -> None:
    if defect.level is not Level.GRAPH:
        assert result.culprit is not None
        assert (result.culprit.stage, result.culprit.module) == (defect.stage, defect.module), str(
            result.culprit
        )
    if defect.cause:
        assert any(defect.cause in cause for cause in result.causes), result.causes


def test_only_the_stage_with_the_defect_fails(tiny_checkpoint) -> None:
    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint, _zero))
    results = list(LEVELS[Level.STAGE](context))
    assert {r.stage for r in results if r.verdict is Verdict.FAIL} == {DENOISER}
    assert {r.stage for r in results if r.verdict is Verdict.PASS} >= {CONDITIONER, VAE_DECODER}


def test_a_vocabulary_that_both_sides_lack_is_caught_without_the_other_side(
    tiny_checkpoint, tmp_path: Path
) -> None:
    """As transformers invents it from tokenizer_config.json alone. Both sides then draw one picture for all prompts."""
    invented = tmp_path / "tokenizer.json"
    GemmaTokenizer().backend_tokenizer.save(str(invented))
    candidate = torch_candidate(tiny_checkpoint, lambda model: replace_tokenizers(model, invented))
    context = context_of(tiny_checkpoint, candidate, TWO_CASES)
    replace_tokenizers(context.reference, invented)
    assert not failures(context, Level.TRAJECTORY)
    found = failures(context, Level.GRAPH)
    assert {result.stage for result in found} == {"tokenizer"}
    details = " | ".join(result.detail for result in found)
    for part in ("the token ids differ for 'a red heart'", "'blue' has the same tokens as another text"):
        assert part in details
    (states,) = failures(context, Level.STAGE)
    assert states.detail == "text_embeds are the same for 'red' and 'blue'"
    assert "has no vocabulary" in states.causes[0]


def test_a_tokenizer_of_another_text_encoder_is_caught_by_the_embedding(tiny_checkpoint) -> None:
    candidate = torch_candidate(
        tiny_checkpoint, lambda model: replace_tokenizers(model, DEMO_CHECKPOINT / "tokenizer/tokenizer.json")
    )
    found = failures(context_of(tiny_checkpoint, candidate), Level.GRAPH)
    assert "the vocabulary has 4096 tokens up to 4095, the embedding has 512 rows" in [
        r.detail for r in found
    ]


def test_a_sentencepiece_file_that_disagrees_with_tokenizer_json_is_caught(
    tiny_checkpoint, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    vocabulary = json.loads((checkpoint / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    for name, wrong in (("tokenizer.model", pieces), ("spiece.model", [*pieces[:4], *reversed(pieces[4:])])):
        (checkpoint / "tokenizer" / name).write_bytes(sentencepiece_model(wrong))
    results = list(LEVELS[Level.GRAPH](context_of(checkpoint, torch_candidate(checkpoint))))
    verdicts = {r.against: r.verdict for r in results if r.against.endswith(".model")}
    assert verdicts == {"tokenizer.model": Verdict.PASS, "spiece.model": Verdict.FAIL}


def test_history_that_is_not_reset_between_requests_is_caught(tiny_checkpoint) -> None:
    """A stale history matters only if the first step reads it. So both sides get a schedule that does."""
    results = {}
    for kind in (ActiveHistory, StaleHistory):
        StaleHistory.left_over = None
        candidate = torch_candidate(tiny_checkpoint, _pipeline(kind))
        context = context_of(tiny_checkpoint, candidate, TWO_CASES)
        patch_pipeline(context.reference, ActiveHistory)
        results[kind] = list(LEVELS[Level.TRAJECTORY](context))
    assert all(r.verdict is Verdict.PASS for r in results[ActiveHistory]), results[ActiveHistory]
    first, second = results[StaleHistory]
    assert first.verdict is Verdict.PASS
    assert second.verdict is Verdict.FAIL
    assert second.culprit.module == "step 1"
    assert "stale history" in second.causes[0]


@pytest.mark.parametrize(
    ("stage", "tensor", "plant"),
    [
        (CONDITIONER, "text_bias has one value only, 0", _ignore_mask),
        (
            VAE_DECODER,
            "image has one value only, 0.25",
            lambda t: patch_forward(module_of(t, VAE_DECODER), lambda self, latents: _grey(latents)),
        ),
    ],
)
def test_a_stage_that_gives_one_value_is_named_by_it_and_not_called_nan(
    stage, tensor, plant, tiny_checkpoint
) -> None:
    found = failures(context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint, plant)), Level.STAGE)
    assert {r.stage for r in found} == {stage}
    assert tensor in [r.detail for r in found]
    assert not any(r.causes for r in found), "its values are finite"


def test_a_nan_in_one_latent_is_named_by_step_and_index(tiny_checkpoint, healthy) -> None:
    index = (0, 3, 1, 2)

    def plant(model: TorchModel) -> None:
        model.pipeline.sessions[DENOISER] = NanAt(model.pipeline.sessions[DENOISER], index)

    (found,) = failures(context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint, plant)), Level.STEP)
    assert found.what.startswith("step 2 of 3")
    assert found.worst.index == index
    assert "1 NaN or Inf" in found.detail
    assert healthy(Level.STEP, DENOISER).value <= 1e-5


def test_a_defect_that_the_reference_shares_is_caught_by_upstream(tiny_checkpoint) -> None:
    """The reference cannot show its own mistakes, but unmodified upstream does, module by module."""
    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint), with_upstream=True)
    assert not failures(context, Level.MODULE)
    patch_forward(module_of(context.reference, DENOISER, f"{BLOCK}.1.attn1.norm_k"), lambda self, x: x)
    found = [r for r in failures(context, Level.MODULE) if r.against == "diffusers"]
    assert [(r.culprit.stage, r.culprit.module) for r in found] == [
        (DENOISER, "transformer_blocks.1.attn1.norm_k")
    ]


def test_a_reordering_that_changes_only_rounding_passes(tiny_checkpoint) -> None:
    def plant(model: TorchModel) -> None:
        for index in (0, 1):
            reorder_ffn(module_of(model, DENOISER, f"{BLOCK}.{index}.ff"))

    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint, plant))
    for level in (Level.STAGE, Level.STEP, Level.TRAJECTORY, Level.PICTURE):
        results = list(LEVELS[level](context))
        assert not [r for r in results if r.verdict is Verdict.FAIL]
    errors = [step.error for step in context.evidence.steps]
    assert max(errors) > 0, "the reordering did not change any rounding, so this test shows nothing"


def test_another_seed_on_both_sides_passes(tiny_checkpoint) -> None:
    settings = replace(SETTINGS, cases=(Case(PROMPTS[1], 12345),))
    context = context_of(tiny_checkpoint, torch_candidate(tiny_checkpoint), settings)
    for level in (Level.STEP, Level.TRAJECTORY, Level.PICTURE):
        assert not failures(context, level)


def test_a_candidate_of_another_checkpoint_fails_in_every_stage_with_weights(
    tiny_checkpoint, other_checkpoint: Path
) -> None:
    context = context_of(tiny_checkpoint, torch_candidate(other_checkpoint))
    assert {r.stage for r in failures(context, Level.STAGE)} >= {CONDITIONER, DENOISER, VAE_DECODER}
