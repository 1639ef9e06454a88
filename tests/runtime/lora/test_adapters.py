"""LoRAs in an open pipeline: what is active, what a switch reopens, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.errors import BundleError, SessionError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import CONDITIONER, DENOISER, TEXT_ENCODER, Backend, Precision

REQUEST = Request(prompt="red", seed=1, num_inference_steps=1, height=64, width=64, output_type="latent")


def lora(
    path: Path, layer: str = "transformer_blocks.0.attn1.to_q", wide: int = 32, component="transformer"
) -> Path:
    """A seeded LoRA of one layer whose input and output have the same width."""
    torch.manual_seed(0)
    name = f"{component}.{layer}.lora_"
    save_file({f"{name}A.weight": torch.randn(2, wide), f"{name}B.weight": torch.randn(wide, 2)}, path)
    return path


@pytest.fixture
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


def drawn(pipeline: Pipeline) -> np.ndarray:
    return np.asarray(pipeline.draw(REQUEST).images)


def test_only_changed_stages_are_opened_again_and_the_way_back_is_exact(pipeline, tmp_path: Path) -> None:
    before, sessions = drawn(pipeline), dict(pipeline.sessions)
    name = pipeline.load_lora_weights(lora(tmp_path / "a.safetensors"))
    assert name == "default_0" and pipeline.get_active_adapters() == [name]
    assert {n for n in sessions if pipeline.sessions[n] is not sessions[n]} == {DENOISER}
    changed, reopened = drawn(pipeline), pipeline.sessions[DENOISER]
    assert np.abs(changed - before).max() > 1e-3
    pipeline.set_adapters(name, 1)
    assert pipeline.sessions[DENOISER] is reopened, "the same LoRAs change nothing"
    pipeline.set_adapters(name, 0.5)
    half = drawn(pipeline)
    assert np.abs(half - changed).max() > 1e-3 and np.abs(half - before).max() > 1e-3
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(drawn(pipeline), before)
    assert pipeline.get_active_adapters() == []
    with pytest.raises(UsageError, match="there is no LoRA 'default_0', only none"):
        pipeline.set_adapters(name)


def test_changed_conditioners_have_rows_of_their_own_in_the_cache(pipeline, tmp_path: Path) -> None:
    before = drawn(pipeline)
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors", "caption_projection.linear_2"), "words")
    assert pipeline.sessions[CONDITIONER] is pipeline.conditioning.conditioner
    assert np.abs(drawn(pipeline) - before).max() > 1e-4
    runs: list[str] = []
    for stage in (CONDITIONER, TEXT_ENCODER):
        session = pipeline.sessions[stage]
        session.run = lambda feeds, stage=stage, run=session.run: runs.append(stage) or run(feeds)
    drawn(pipeline)
    assert not runs, "the rows come from the cache"
    pipeline.set_adapters([])
    np.testing.assert_array_equal(drawn(pipeline), before)


def test_a_text_encoder_can_have_a_lora(pipeline, tmp_path: Path) -> None:
    before = drawn(pipeline)
    file = lora(tmp_path / "a.safetensors", "layers.0.self_attn.q_proj", 24, "text_encoder")
    pipeline.load_lora_weights(file)
    assert np.abs(drawn(pipeline) - before).max() > 1e-4


@pytest.mark.parametrize("other", [False, True], ids=["alone", "beside a changed stage"])
def test_a_stage_that_cannot_be_opened_leaves_the_bundles_own_weights(
    pipeline, tmp_path, monkeypatch, other: bool
) -> None:
    from ditc.runtime.lora import reopener

    before, uncertified = drawn(pipeline), pipeline.uncertified
    names = [pipeline.load_lora_weights(lora(tmp_path / "a.safetensors"))]
    if other:  # the failed change does not touch the text encoder, which has a LoRA already
        file = lora(tmp_path / "b.safetensors", "layers.0.self_attn.q_proj", 24, "text_encoder")
        names.append(pipeline.load_lora_weights(file))
    opened = reopener.open_session

    def fail(*arguments, weights=None):
        if weights:
            raise SessionError("no memory")
        return opened(*arguments)

    monkeypatch.setattr(reopener, "open_session", fail)
    with pytest.raises(SessionError, match="no memory"):
        pipeline.set_adapters(names, [0.5, 1.0][: len(names)])
    assert pipeline.uncertified == uncertified
    assert pipeline.get_active_adapters() == []
    np.testing.assert_array_equal(drawn(pipeline), before)


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        ("other", None, "there is no LoRA 'other', only a"),
        (["a", "a"], None, "give every name once"),
        (["a"], [1.0, 2.0], "one weight for each name"),
        ("a", float("inf"), "which is not a finite number"),
    ],
)
def test_wrong_names_and_weights_are_refused(names, weights, words, pipeline, tmp_path: Path) -> None:
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors"), "a")
    with pytest.raises(UsageError) as refused:
        pipeline.set_adapters(names, weights)
    assert words in f"{refused.value} {refused.value.hint}"
    assert pipeline.get_active_adapters() == ["a"]
    with pytest.raises(UsageError, match="there is a LoRA 'a' already"):
        pipeline.load_lora_weights(tmp_path / "a.safetensors", "a")


def test_weights_in_8_bits_are_read_from_the_most_exact_graph_too(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    (fp32,) = manifest.stages[DENOISER].artifacts
    half, eight = (replace(fp32, precision=precision) for precision in (Precision.FP16, Precision.INT8))
    stage = replace(manifest.stages[DENOISER], artifacts=(half, fp32, eight))
    manifest = replace(manifest, stages={**manifest.stages, DENOISER: stage})
    for artifact, read in ((eight, (eight, fp32)), (half, (half,)), (fp32, (fp32,))):
        reopener = Reopener(tiny_bundle, manifest, {DENOISER: artifact}, LoadOptions())
        assert reopener.graphs(DENOISER) == read


def test_engines_take_loras_if_they_were_built_for_it(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    file = read_lora(lora(tmp_path / "a.safetensors"))
    for refit in (None, True):
        engines = {
            name: replace(stage.artifacts[0], backend=Backend.TENSORRT, refit=refit)
            for name, stage in manifest.stages.items()
        }
        reopener = Reopener(tiny_bundle, manifest, engines, LoadOptions())
        loras = [ScaledLora(reopener.resolved(file))]
        if refit:
            assert list(reopener.stages_of(loras)) == [DENOISER]
            continue
        with pytest.raises(UsageError, match="the denoiser runs in TensorRT, and its engine") as refused:
            reopener.stages_of(loras)
        assert "build with --refit" in str(refused.value.hint)


def test_a_graph_that_was_damaged_after_loading_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = load_manifest(bundle)
    (fp32,) = manifest.stages[DENOISER].artifacts
    stage = replace(manifest.stages[DENOISER], artifacts=(fp32, replace(fp32, precision=Precision.INT8)))
    manifest = replace(manifest, stages={**manifest.stages, DENOISER: stage})
    artifacts = {name: stage.artifacts[-1] for name, stage in manifest.stages.items()}
    with (bundle / fp32.data[0].path).open("r+b") as file:
        file.write(b"other")
    reopener = Reopener(bundle, manifest, artifacts, LoadOptions())
    loras = [ScaledLora(reopener.resolved(read_lora(lora(tmp_path / "a.safetensors"))))]
    with pytest.raises(BundleError, match="has been changed"):
        reopener.open(DENOISER, reopener.stages_of(loras)[DENOISER])


def test_a_lora_of_another_network_is_refused(pipeline, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"a weight of shape \(5, 5\), but transformer_blocks.0.attn1.to_q.weight"
    ):
        pipeline.load_lora_weights(lora(tmp_path / "wide.safetensors", wide=5))
    with pytest.raises(UsageError, match=r"the transformer has no no_layer.weight"):
        pipeline.load_lora_weights(lora(tmp_path / "no.safetensors", "no_layer"))
    assert pipeline.get_active_adapters() == []


def test_run_draws_with_a_lora_and_writes_it_into_the_picture(tiny_bundle, tmp_path: Path) -> None:
    from PIL import Image

    run = [
        "run",
        str(tiny_bundle),
        "red",
        "--steps",
        "1",
        "--seed",
        "1",
        "--threads",
        "1",
        "--backend",
        "onnxruntime",
    ]
    file = lora(tmp_path / "a.safetensors")
    for name, options in (("plain", []), ("lora", ["--lora", f"{file}:0.5"])):
        assert main([*run, "-o", str(tmp_path / f"{name}.png"), *options]) == 0
    plain, drawn = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "lora"))
    assert '"scale": 0.5' in drawn.text["settings"] and '"file": "a.safetensors"' in drawn.text["settings"]
    assert "loras" not in plain.text["settings"] and drawn.tobytes() != plain.tobytes()
    assert main([*run, "-o", str(tmp_path / "x.png"), "--lora", f"{file}:nan"]) == 2
