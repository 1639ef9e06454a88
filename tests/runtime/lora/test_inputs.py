"""Bundles whose graphs take LoRAs as inputs: a switch opens nothing, and computes what changed weights compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditc.export.build.preflight import check_options
from ditc.export.contract import BuildOptions
from ditc.runtime.errors import UsageError
from ditc.runtime.lora.inputs import WithLoras
from ditc.runtime.metrics import relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.spec import CONDITIONER, DENOISER, Backend, Precision

REQUEST = Request(prompt="red", seed=1, num_inference_steps=2, height=64, width=64, output_type="latent")
# Two steps in fp32, whose products are summed in another order.
SAME = 1e-5
LAYERS = {
    "transformer_blocks.0.attn1.to_q": (32, 32),
    "transformer_blocks.1.attn2.to_v": (32, 32),  # in the conditioner
    "transformer_blocks.1.ff.conv_point": (32, 80),
    "time_embed.linear": (192, 32),  # a Gemm
    "proj_out": (8, 32),
}


def lora(path: Path, rank: int = 3, seed: int = 0, *, dora: bool = False) -> Path:
    torch.manual_seed(seed)
    tensors = {}
    for layer, (outputs, inputs) in LAYERS.items():
        ones = (1, 1) if "conv" in layer else ()
        name = f"transformer.{layer}"
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, inputs, *ones)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, rank, *ones)
        tensors[f"{name}.alpha"] = torch.tensor(2.0 * rank)
        if dora and not ones:
            tensors[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(outputs)
    save_file(tensors, path)
    return path


def drawn(pipeline: Pipeline) -> np.ndarray:
    return np.asarray(pipeline.draw(REQUEST).images)


@pytest.fixture(params=["onnxruntime", "openvino"])
def pipelines(
    request: pytest.FixtureRequest, lora_inputs_bundle: Path
) -> Iterator[tuple[Pipeline, Pipeline]]:
    """With LoRAs in the weights, and as inputs."""
    plain = request.getfixturevalue("tiny_bundle" if request.param == "onnxruntime" else "openvino_bundle")
    with (
        Pipeline.load(plain, backend=request.param, threads=1) as weights,
        Pipeline.load(lora_inputs_bundle, backend=request.param, threads=1) as inputs,
    ):
        yield weights, inputs


def test_a_switch_opens_nothing_and_draws_the_same(pipelines, tmp_path: Path, monkeypatch) -> None:
    weights, inputs = pipelines
    own, sessions = drawn(inputs), dict(inputs.sessions)
    # Without a LoRA, exact zeros are added. OpenVINO fuses other nodes then.
    assert relative_l2(own, drawn(weights)) <= SAME
    files = [lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", rank=5, seed=1)]
    for file in files:
        weights.load_lora_weights(file)
    from ditc.runtime.lora import reopener

    monkeypatch.setattr(reopener, "open_session", None)
    for file in files:
        inputs.load_lora_weights(file)
    seen = [own]
    for names, scales in (
        (["default_0"], [1.0]),
        (["default_1", "default_0"], [0.7, -1.3]),
        (["default_1"], [0.5]),
    ):
        inputs.set_adapters(names, scales)
        got = drawn(inputs)
        assert {n for n, s in inputs.sessions.items() if isinstance(s, WithLoras)} == {CONDITIONER, DENOISER}
        assert inputs.sessions[DENOISER].base is sessions[DENOISER]
        monkeypatch.undo()
        weights.set_adapters(names, scales)
        monkeypatch.setattr(reopener, "open_session", None)
        assert relative_l2(got, drawn(weights)) <= SAME
        assert all(relative_l2(got, other) > 100 * SAME for other in seen)
        seen.append(got)
    inputs.unload_lora_weights()
    assert inputs.sessions == sessions
    np.testing.assert_array_equal(drawn(inputs), own)


def test_dora_is_added_to_the_weights_and_taken_out_again(pipelines, tmp_path: Path) -> None:
    weights, inputs = pipelines
    own, sessions = drawn(inputs), dict(inputs.sessions)
    for pipeline in pipelines:
        pipeline.load_lora_weights(lora(tmp_path / "a.safetensors"), "plain")
        pipeline.load_lora_weights(lora(tmp_path / "d.safetensors", dora=True), "dora")
    assert not isinstance(inputs.sessions[DENOISER], WithLoras)
    assert relative_l2(drawn(inputs), drawn(weights)) <= SAME
    for pipeline in pipelines:
        pipeline.set_adapters("plain")
    assert relative_l2(drawn(inputs), drawn(weights)) <= SAME
    inputs.set_adapters([])
    assert not any(isinstance(session, WithLoras) for session in inputs.sessions.values())
    assert inputs.sessions[DENOISER] is not sessions[DENOISER]
    np.testing.assert_array_equal(drawn(inputs), own)
    inputs.set_adapters("plain", 0.5)
    assert isinstance(inputs.sessions[DENOISER], WithLoras)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            BuildOptions(lora_inputs=True, backend=Backend.TENSORRT_RTX),
            "--lora-inputs is not made for tensorrt",
        ),
        (BuildOptions(lora_inputs=True, precision=Precision.INT8), "--lora-inputs is not made for int8"),
    ],
)
def test_builds_that_cannot_have_the_inputs_are_refused(options, words) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        check_options(options)
    assert "leave it out" in str(refused.value.hint)
