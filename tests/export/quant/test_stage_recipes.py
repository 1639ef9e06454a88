"""Recipes and ranges are given once per stage, and another stage than the denoiser runs in 8 bits only if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from ditc.export.build.builder import build_bundle
from ditc.export.options import BuildOptions
from ditc.export.quant.formats import Format
from ditc.export.quant.recipes import Recipe, Rule, save_recipe
from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import TEXT_ENCODER, Precision

WEIGHTS = Recipe(
    name="encoder",
    stage=TEXT_ENCODER,
    rules=(Rule(layers="*_proj", kind=Format.INT8),),
    activations=False,
    smooth=False,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_recipe(WEIGHTS, tmp_path_factory.mktemp("recipe") / "encoder.json"))


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny bundle, with the text encoder in 8 bits beside the one in fp32."""
    path = copytree(tiny_bundle, tmp_path_factory.mktemp("stage") / "bundle")
    build_bundle(tiny_checkpoint, path, BuildOptions(recipes=(recipe,)))
    return path


def precision(manifest: Manifest, stage_precision: str = "") -> Precision:
    return choose(manifest, LoadOptions(stage_precision=stage_precision))[0][TEXT_ENCODER].precision


def test_a_recipe_of_another_stage_adds_an_artifact_in_8_bits(bundle: Path) -> None:
    kinds = [(a.precision, a.recipe) for a in load_manifest(bundle).stages[TEXT_ENCODER].artifacts]
    assert kinds == [(Precision.FP32, None), (Precision.INT8, "encoder")]


def test_8_bits_are_taken_only_where_the_stage_is_named(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert precision(manifest) is Precision.FP32
    assert precision(manifest, "text_encoder=int8") is Precision.INT8
    assert "int8" not in choose(manifest)[1]
    assert "text_encoder int8" in choose(manifest, LoadOptions(stage_precision="text_encoder=int8"))[1]


def test_a_bundle_that_holds_only_8_bits_says_how_to_ask_for_them(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    stage = manifest.stages[TEXT_ENCODER]
    alone = replace(stage, artifacts=stage.artifacts[1:])
    with pytest.raises(UsageError, match="not 8 bits, because --stage-precision does not name it") as caught:
        choose(replace(manifest, stages={**manifest.stages, TEXT_ENCODER: alone}))
    assert caught.value.hint == "--stage-precision text_encoder=int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text_encoder", "is not STAGE=PRECISION"),
        ("text_encoder=int7", "is not STAGE=PRECISION"),
        ("denoiser=int8", "names denoiser"),
        ("vae=int8", "names vae, but a picture needs"),
        ("vae_decoder=int8", "the bundle holds vae_decoder for onnxruntime fp32; requested: int8"),
    ],
)
def test_stages_and_precisions_that_are_not_there_are_refused(bundle: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        precision(load_manifest(bundle), text)


def test_the_8_bit_stage_draws_another_picture_than_the_exact_one(bundle: Path) -> None:
    pictures = []
    for text in ("", "text_encoder=int8"):
        with Pipeline.load(bundle, stage_precision=text) as pipeline:
            request = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
            pictures.append(pipeline("a red heart", **request).images[0])
    assert 0 < abs(pictures[0] - pictures[1]).max() < 0.2


def refused(checkpoint: Path, tmp_path: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(**options))
    assert not (tmp_path / "bundle").exists()
    assert caught.value.hint
    return str(caught.value)


def test_two_recipes_of_one_stage_are_refused(tiny_checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    assert "are both for text_encoder" in refused(tiny_checkpoint, tmp_path, recipes=(recipe, recipe))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": (Rule(layers="nothing", kind=Format.INT8),)}, "names none of this network's"),
        (
            {"network": "T5EncoderModel"},
            "is for T5EncoderModel, but this checkpoint's text_encoder is Gemma2Model",
        ),
        ({"stage": "text_encoder_9"}, "is for text_encoder_9, which this checkpoint does not have"),
        ({"activations": True}, "quantizes activations and needs --ranges"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_the_build(
    changes: dict[str, object], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = save_recipe(replace(WEIGHTS, **changes), tmp_path / "recipe.json")
    assert message in refused(tiny_checkpoint, tmp_path, recipes=(str(path),))
