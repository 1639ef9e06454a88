"""Pipelines that share sessions: each draws with its own LoRAs, and what cannot be an input is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import LoraError, SessionError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.inputs import why_no_inputs
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import read_lora
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.lora.shared import Matrices
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.sessions import onnxruntime
from ditc.runtime.spec import DENOISER, VAE_DECODER
from ditc.runtime.weight_map import read_weight_map

REQUEST = Request(prompt="red", seed=1, num_inference_steps=2, height=64, width=64, output_type="latent")
LOAD = LoadOptions(backend="onnxruntime", threads=1)
QUERY = "transformer.transformer_blocks.0.attn1.to_q"
VALUE = "transformer.transformer_blocks.1.attn2.to_v"  # in the conditioner
TEXT = "text_encoder.layers.0.self_attn.q_proj"


def lora(path: Path, *names: str, seed: int = 0, outputs: int = 32, **more: torch.Tensor) -> LoraChoice:
    """A LoRA of rank 2; all widths are 32, but those of the text encoder are 24."""
    torch.manual_seed(seed)
    tensors = {}
    for name in names or (QUERY, VALUE):
        inputs, rows = (24, 24) if name == TEXT else (32, outputs)
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, inputs)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(rows, 2)
        tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in more.items()}
    save_file(tensors, path)
    return LoraChoice(path, 0.5)


def drawn(pipeline: Pipeline) -> np.ndarray:
    return np.asarray(pipeline.draw(REQUEST).images)


@pytest.fixture
def pipeline(lora_inputs_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(lora_inputs_bundle, options=LOAD) as loaded:
        yield loaded


def test_pipelines_share_sessions_and_texts_and_draw_with_their_own_loras(pipeline, tmp_path: Path) -> None:
    choices = [lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
    own = drawn(pipeline)
    shared = [pipeline.with_loras([choice]) for choice in choices]
    both = pipeline.with_loras(choices)
    found = [drawn(one) for one in (*shared, both)]
    np.testing.assert_array_equal(drawn(pipeline), own)
    for one, choice, picture in zip(shared, choices, found, strict=False):
        assert one.sessions[DENOISER].base is pipeline.sessions[DENOISER]
        assert one.sessions[VAE_DECODER] is pipeline.sessions[VAE_DECODER]
        assert one.conditioning.cache is pipeline.conditioning.cache, "texts are encoded once for all"
        assert one.get_active_adapters() == [choice.file.name]
        assert [(told["file"], told["scale"]) for told in one.loras_in_weights()] == [(choice.file.name, 0.5)]
        assert choice.file.name in one.uncertified
        pipeline.load_loras([choice])
        np.testing.assert_array_equal(drawn(pipeline), picture)
        pipeline.unload_lora_weights()
    pipeline.load_loras(choices)
    np.testing.assert_array_equal(drawn(pipeline), found[2])
    pipeline.unload_lora_weights()
    assert min(relative_l2(one, other) for one in found for other in (own,)) > 1e-3
    both.close()
    np.testing.assert_array_equal(drawn(shared[0]), found[0])  # its sessions are the first pipeline's


def test_matrices_are_bounded_and_read_again(pipeline, tmp_path: Path) -> None:
    matrices = Matrices(2)
    choices = [lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(3)]
    shared = [pipeline.with_loras([choice], matrices=matrices) for choice in choices]
    # A and B of 32 x 2 values in fp32, of two layers, for two LoRAs.
    assert matrices.count == 2 and matrices.size_bytes == 2 * 2 * 2 * 32 * 2 * 4
    first = drawn(shared[0])
    choices[2].file.unlink()
    with pytest.raises(LoraError, match="cannot be read again"):
        drawn(pipeline.with_loras([choices[1]], matrices=matrices)), drawn(shared[0]), drawn(shared[2])
    np.testing.assert_array_equal(drawn(shared[0]), first)
    lora(choices[0].file, seed=5)
    np.testing.assert_array_equal(drawn(shared[0]), first)  # its matrices are in memory
    drawn(pipeline.with_loras([choices[1]], matrices=matrices)), drawn(shared[1])
    with pytest.raises(LoraError, match=r"0\.safetensors has changed since it was loaded"):
        drawn(shared[0])
    with pytest.raises(UsageError, match="0 LoRAs in memory are none"):
        Matrices(0)


REFUSED: dict[str, tuple[Callable[[Path], LoraChoice], str]] = {
    "DoRA": (
        lambda path: lora(path, QUERY, lora_magnitude_vector=torch.ones(32)),
        f"{QUERY} is a DoRA, which gives the rows of a weight other lengths",
    ),
    "text encoder": (
        lambda path: lora(path, TEXT),
        f"{TEXT} changes layers.0.self_attn.q_proj.weight, for which the text_encoder has no input",
    ),
    "no such layer": (
        lambda path: lora(path, "transformer.transformer_blocks.7.attn1.to_q"),
        "the transformer has no transformer_blocks.7.attn1.to_q.weight",
    ),
    "another width": (lambda path: lora(path, outputs=48), "by a weight of shape (48, 32)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lora_that_cannot_be_an_input_is_named_with_the_reason(name, pipeline, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(UsageError) as refused:
        pipeline.with_loras([make(tmp_path / "a.safetensors")])
    assert words in str(refused.value) and refused.value.hint


def test_pipelines_that_cannot_share_are_refused(pipeline, tiny_bundle: Path, tmp_path: Path) -> None:
    choice = lora(tmp_path / "a.safetensors")
    with (
        Pipeline.load(tiny_bundle, options=LOAD) as plain,
        pytest.raises(UsageError, match="for which the conditioner has no input") as refused,
    ):
        plain.with_loras([choice])
    assert "build the bundle with --lora-inputs" in str(refused.value.hint)
    pipeline.load_loras([choice])
    with pytest.raises(UsageError, match="the pipeline has LoRAs of its own: default_0"):
        pipeline.with_loras([choice])
    with pytest.raises(UsageError, match="there is no LoRA 'other', only default_0"):
        pipeline.set_adapters("other")
    pipeline.unload_lora_weights()
    shared = pipeline.with_loras([choice])
    with pytest.raises(UsageError, match="sessions that are not a bundle's"):
        shared.load_lora_weights(choice.file)
    pipeline.close()
    with pytest.raises(SessionError, match="closed"):
        pipeline.with_loras([choice])


def test_the_library_that_runs_a_stage_must_take_the_inputs(
    lora_inputs_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    manifest = load_manifest(lora_inputs_bundle)
    file = read_lora(lora(tmp_path / "a.safetensors").file)

    def why(**options: Any) -> str:
        load = LoadOptions(threads=1, **options)
        artifacts, _ = choose_here(lora_inputs_bundle, manifest, load)
        reopener = Reopener(lora_inputs_bundle, manifest, artifacts, load)
        return reopener.why_no_inputs([ScaledLora(reopener.resolved(file))])

    assert why(backend="onnxruntime") == why(backend="openvino") == ""
    assert (
        why(backend="openvino", device="GPU") == "OpenVINO takes no LoRAs as inputs of the conditioner here"
    )
    monkeypatch.setattr(onnxruntime, "cuda_lack", lambda: "")
    assert "ONNX Runtime takes no LoRAs as inputs" in why(backend="onnxruntime")
    assert why(backend="onnxruntime", provider="cpu") == ""


def test_weights_in_8_bits_have_no_inputs(lora_inputs_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(lora_inputs_bundle)
    (ref,) = {a.weights.path for a in manifest.stages[DENOISER].artifacts if a.weights is not None}
    weights = read_weight_map(lora_inputs_bundle / ref)
    layers = read_lora(lora(tmp_path / "a.safetensors", QUERY).file).layers
    changes = {f"{QUERY.removeprefix('transformer.')}.weight": [(layer, 1.0) for layer in layers.values()]}
    assert why_no_inputs(weights, changes) == ""
    eight_bits = [replace(weight, lora=None) for weight in weights]  # as --lora-inputs refuses such builds
    assert "for which the denoiser has no input" in why_no_inputs(eight_bits, changes)
