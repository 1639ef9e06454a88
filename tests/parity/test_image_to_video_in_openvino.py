"""Image-to-video in OpenVINO, in fp32, 16 and 8 bits: bundles are built and pass parity, and held frames stay.

The other tests of image-to-video run PyTorch, and ONNX Runtime in fp32.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import need_openvino
from PIL import Image

from ditc.calib.collect import Settings, collect
from ditc.export.build.builder import build_bundle
from ditc.export.options import BuildOptions
from ditc.runtime.cli import main
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import to_numpy
from ditc.runtime.spec import Backend, Precision

pytestmark = pytest.mark.slow  # the whole file takes 140 s of one core, most of it for exports

PROMPTS = ["a red cat", "dogs run", "a bird", "the sea", "a tree", "snow falls", "a car drives", "rain"]
STEPS = 4
OPTIONS = BuildOptions(backend=Backend.OPENVINO)


@pytest.fixture(scope="module")
def bundles(
    video_checkpoint: Path, video_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bundles for OpenVINO, by the precision of the denoiser."""
    need_openvino()
    root = tmp_path_factory.mktemp("openvino-videos")
    found = {name: root / name for name in ("fp32", "bf16", "int8")}
    shutil.copytree(video_bundle, found["fp32"])
    build_bundle(video_checkpoint, found["fp32"], OPTIONS)
    build_bundle(video_checkpoint, found["bf16"], replace(OPTIONS, precision=Precision.BF16))
    ranges = root / "ranges.safetensors"
    collect(video_checkpoint, PROMPTS, ranges, Settings(num_inference_steps=STEPS))
    shutil.copytree(found["bf16"], found["int8"])
    options = replace(OPTIONS, precision=Precision.INT8, ranges=(ranges,))
    build_bundle(video_checkpoint, found["int8"], options)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_parity_passes_with_a_case_from_a_picture(
    bundles: dict[str, Path],
    video_checkpoint: Path,
    precision: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]) + "\n")
    run = ["parity", str(bundles[precision]), "--against", str(video_checkpoint), "--backend", "openvino"]
    case = ["--precision", precision, "--prompts", str(prompts), "--seeds", "0", "--steps", str(STEPS)]
    capsys.readouterr()
    passed = main([*run, *case, "--threads", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    failed = [result for result in printed["levels"] if result["verdict"] == "fail"]
    assert passed, failed
    from_picture = [result for result in printed["levels"] if "image-to-video" in result["what"]]
    assert {result["level"] for result in from_picture if result["pass"]} >= {"step", "trajectory", "picture"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_first_frame_stays_as_the_encoder_gave_it(bundles: dict[str, Path], precision: str) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    settings: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": STEPS, "frames": 9, "seed": 5}
    with Pipeline.load(bundles[precision], backend="openvino", precision=precision, threads=1) as pipeline:
        request = Request(image=Image.fromarray(blocks), output_type="latent", **settings)
        (state,) = pipeline.start(pipeline.plan(request))
        first = to_numpy(state.latents)[:, :, 0]
        drawn = np.asarray(pipeline.draw(request).frames)
    assert np.array_equal(drawn[:, :, 0], first)
    assert not np.array_equal(drawn[:, :, 1], to_numpy(state.latents)[:, :, 1])
