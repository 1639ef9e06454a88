"""Text encoders in INT8: the recipes by network, where they are refused, and how parity judges what they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from ditc.export.build.builder import build_bundle
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.families import find_adapter
from ditc.export.options import BuildOptions
from ditc.export.quant.apply import prepare
from ditc.export.quant.layers import quantizable_layers
from ditc.parity.candidate import open_candidate
from ditc.parity.cases import Case, Settings
from ditc.parity.context import Context
from ditc.parity.levels import LEVELS
from ditc.parity.reference.pytorch import TorchModel
from ditc.parity.results import Result, Verdict
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.spec import TEXT_ENCODER, Backend, Precision
from ditc.runtime.tolerances import Level

LEVELS_WITH_TEXT = (Level.STAGE, Level.STEP, Level.TRAJECTORY, Level.PICTURE)


def recipes(checkpoint: Path, *names: str, backend: Backend = Backend.ONNXRUNTIME) -> dict[str, list[str]]:
    """By stage, the layers that the recipes put into 8 bits."""
    options = BuildOptions(recipes=names, backend=backend)
    opened = open_checkpoint(checkpoint)
    plan = find_adapter(opened).plan(opened, options)
    model = TorchModel(checkpoint)
    return {
        stage: list(quantization.recipe.formats(quantizable_layers(model.load(stage))))
        for stage, quantization in prepare(options, opened, plan).items()
    }


def test_a_recipe_is_for_every_encoder_of_its_network(sd3_checkpoint: Path) -> None:
    found = recipes(sd3_checkpoint, "clip-int8-weights", "t5-int8-dynamic")
    assert list(found) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert all(any("self_attn.q_proj" in name for name in found[s]) for s in list(found)[:2])
    t5 = found["text_encoder_3"]
    assert any(name.endswith("SelfAttention.q") for name in t5) and any("wi_0" in name for name in t5)
    assert not [name for name in t5 if name.endswith(".wo")], "the last Linear of an MLP stays high"


def test_gemma_has_a_recipe_for_weights_and_one_for_inputs_too(tiny_checkpoint: Path) -> None:
    (weights,) = recipes(tiny_checkpoint, "gemma2-int8-weights").values()
    (inputs_too,) = recipes(tiny_checkpoint, "gemma2-int8-dynamic").values()
    assert {name.rsplit(".", 1)[-1] for name in set(weights) - set(inputs_too)} == {"down_proj"}
    assert set(inputs_too) < set(weights)


def test_another_network_is_refused_and_the_fitting_recipes_are_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"is for T5EncoderModel, but .* text_encoder is Gemma2Model") as e:
        recipes(tiny_checkpoint, "t5-int8-weights")
    assert e.value.hint == "use gemma2-int8-weights or gemma2-int8-dynamic"


@pytest.mark.parametrize("backend", [Backend.TENSORRT_RTX, Backend.TENSORRT])
def test_scales_of_tokens_are_refused_for_engines(tiny_checkpoint: Path, backend: Backend) -> None:
    with pytest.raises(UsageError, match=f"an int8-dynamic text_encoder, which is not made for {backend}"):
        recipes(tiny_checkpoint, "gemma2-int8-dynamic", backend=backend)
    assert recipes(tiny_checkpoint, "gemma2-int8-weights", backend=backend)


@pytest.fixture(scope="module", params=["weights", "dynamic"])
def context(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Context:
    bundle = copytree(tiny_bundle, tmp_path_factory.mktemp("text") / "bundle")
    build_bundle(tiny_checkpoint, bundle, BuildOptions(recipes=(f"gemma2-int8-{request.param}",)))
    asked = "text_encoder=int8" + ("-dynamic" if request.param == "dynamic" else "")
    candidate = open_candidate(bundle, LoadOptions(stage_precision=asked, threads=1))
    defaults = candidate.manifest.defaults
    settings = Settings(
        cases=(Case("a red heart", 0),),
        num_inference_steps=3,
        guidance_scale=defaults.guidance_scale,
        height=defaults.height,
        width=defaults.width,
    )
    reference = TorchModel(tiny_checkpoint, like=candidate.manifest)
    return Context(reference_or_none=reference, candidate=candidate, settings=settings, with_upstream=False)


def results(context: Context, level: Level) -> list[Result]:
    return [r for r in LEVELS[level](context) if r.verdict is not Verdict.NOT_CHECKED]


@pytest.mark.parametrize("level", LEVELS_WITH_TEXT)
def test_parity_judges_latents_and_pictures_by_simulation(context: Context, level: Level) -> None:
    found = results(context, level)
    assert found and not [r for r in found if r.verdict is Verdict.FAIL]
    if level is Level.STAGE:
        assert max(r.value for r in found if r.stage == TEXT_ENCODER) > 1e-3, "the loss of 8 bits shows"


@pytest.mark.parametrize("level", [Level.STEP, Level.TRAJECTORY])
def test_an_encoder_in_8_bits_that_says_it_is_fp32_fails(context: Context, level: Level) -> None:
    candidate = replace(context.candidate, precisions={}, plans={})
    lying = Context(
        reference_or_none=context.reference,
        candidate=candidate,
        settings=context.settings,
        with_upstream=False,
    )
    assert candidate.precision(TEXT_ENCODER) is Precision.FP32
    assert [r for r in results(lying, level) if r.verdict is Verdict.FAIL]
