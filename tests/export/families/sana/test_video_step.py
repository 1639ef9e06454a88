"""SANA-Video's denoiser as a whole step, exported by the exporter itself: latents with frames through every pass."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import SanaVideoPipeline
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.families import find_adapter
from ditc.export.families.common.specs import DenoiserFacts, denoiser_spec
from ditc.export.families.sana.video_network import SanaVideoConfig, load_sana_video
from ditc.export.graph.onnx import to_onnx
from ditc.export.graph.step import wrap
from ditc.export.networks.loading import weight_map
from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DType, Precision, Range, TensorSpec
from ditc.runtime.step_contract import (
    FRAMES,
    HEIGHT,
    ROWS,
    TEXT_LENGTH,
    VIDEO_AXES,
    WIDTH,
    A,
    B,
    StepContract,
)
from tests.tiny_sana_video import make_checkpoint

FP32_BOUND = 1e-5  # as in test_video_network.py
TEXT = 12


def test_a_plan_has_the_defaults_of_the_pipeline_and_the_stages_of_a_video(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint")
    (directory / "ditc.json").unlink()
    checkpoint = open_checkpoint(directory)
    plan = find_adapter(checkpoint).plan(checkpoint, BuildOptions())
    asked = inspect.signature(SanaVideoPipeline.__call__).parameters
    defaults = plan.defaults
    for name in ("height", "width", "frames", "num_inference_steps", "guidance_scale"):
        assert getattr(defaults, name) == asked[name].default, name
    assert defaults.bins == tuple((int(h), int(w)) for h, w in ASPECT_RATIO_480_BIN.values())
    assert plan.text[0].prefix == "\n".join(asked["complex_human_instruction"].default)
    assert plan.latents.shape(480, 832, 81) == (
        16,
        21,
        120,
        208,
    )  # four pixels per cell, in the tiny checkpoint
    assert plan.stages["denoiser"].spec.profile[FRAMES] == Range(1, 21, 42)
    kept = [tensor for tensor in plan.stages["vae_decoder"].spec.outputs if tensor.name.startswith("kept_")]
    taken = plan.stages["vae_decoder_next"].spec.inputs[1:]
    assert tuple(kept) == taken and len(taken) == 20


def test_a_number_of_frames_that_no_video_has_is_refused_before_the_build(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "checkpoint")
    (directory / "ditc.json").write_text('{"frames": 80}')
    checkpoint = open_checkpoint(directory)
    with pytest.raises(UsageError, match="frames is 80"):
        find_adapter(checkpoint).plan(checkpoint, BuildOptions())


def test_a_step_of_a_video_equals_diffusers_after_export(tmp_path: Path, relative_l2) -> None:
    pipeline = SanaVideoPipeline.from_pretrained(make_checkpoint(tmp_path / "checkpoint"))
    module = pipeline.transformer.eval()
    config = SanaVideoConfig.from_json(module.config)
    conditioner, denoiser = load_sana_video(config, module.state_dict(), torch.float32)
    contract = StepContract()
    kv = (ROWS, config.num_layers, 2, TEXT_LENGTH, config.cross_width)
    facts = DenoiserFacts(
        channels=config.in_channels,
        out_channels=config.out_channels,
        conditioning=(
            TensorSpec("cross_kv", DType.FLOAT32, kv),
            TensorSpec("text_bias", DType.FLOAT32, (ROWS, TEXT_LENGTH)),
        ),
        sizes={FRAMES: Range(1, 3, 21), HEIGHT: Range(2, 4, 16, 2), WIDTH: Range(2, 6, 16, 2)},
        text={TEXT_LENGTH: Range(1, TEXT, TEXT)},
        step=contract,
        axes=VIDEO_AXES,
    )
    step = wrap(denoiser, dtype=torch.float32, contract=contract)
    stage = StageModule(
        spec=denoiser_spec(facts, max_batch=1),
        precision=Precision.FP32,
        module=step,
        weights=tuple(weight_map({"denoiser": step}, module.state_dict())),
    )
    files = to_onnx(
        stage, tmp_path / "denoiser.onnx"
    )  # it compares the graph with PyTorch at two sets of sizes
    graph = ir.load(files.model).graph
    assert [node.op_type for node in graph if node.domain == "ditc"] == ["RotaryLinearAttention"] * 2

    latents, text = torch.randn(1, 16, 4, 6, 8), torch.randn(2, 7, 24)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    expected = module(
        torch.cat([latents, latents]),
        text,
        timestep=torch.tensor([700.0, 700.0]),
        encoder_attention_mask=mask,
    ).sample
    guided = expected[1] + 4 * (expected[0] - expected[1])
    coefficients = [{A: 1.0, B: -0.7}.get(name, float(name == "c_in")) for name in contract.columns]
    cross_kv, text_bias = conditioner(text, mask)
    session = OnnxRuntimeSession(files.model, stage.spec, provider=CPU)
    outputs = session.run(
        {
            "latents": latents.numpy(),
            "row_of": np.zeros(2, np.int64),
            "timestep": np.float32([700.0]),
            "guidance_weights": np.float32([[4.0, -3.0]]),
            "coefficients": np.float32([coefficients]),
            "history": np.zeros((1, 1, *latents.shape[1:]), np.float32),
            "cross_kv": cross_kv.numpy(),
            "text_bias": text_bias.numpy(),
        }
    )
    x0 = torch.from_numpy(np.array(outputs["x0"]))[0]
    assert relative_l2(x0, latents[0] - 0.7 * guided) <= FP32_BOUND
    assert outputs["stats"][0, 0] == 0 and outputs["stats"][0, 1] == pytest.approx(float(x0.abs().max()))
