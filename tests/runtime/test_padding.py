"""Padding that has no effect is left out of the computation, and texts of different lengths still share a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import made_once, need_openvino
from pictures import Reference, assert_same, draw
from PIL import Image

from ditc.export.build.builder import build_bundle
from ditc.export.contract import BuildOptions
from ditc.runtime.batch import Batch
from ditc.runtime.conditioning import Conditioning, stack_texts
from ditc.runtime.errors import UsageError
from ditc.runtime.padding import Padding
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.row_stack import RowStack
from ditc.runtime.serving.scheduling.job import batch_key
from ditc.runtime.session import to_numpy
from ditc.runtime.sessions.openvino import OpenvinoSession
from ditc.runtime.spec import DENOISER, TEXT_ENCODER, Backend
from ditc.runtime.state import DenoiseState, Rows
from ditc.runtime.text import LENGTH_STEP

INSTRUCTION = ["Make it large", "and bright. "]
LENGTH = 3 * LENGTH_STEP - 6  # tokens that the texts are padded to: not a multiple of the step
# Prompts that need one, two and three steps of tokens: the tiny tokenizer makes one of about every letter.
PROMPTS = {32: "red cat", 64: "red cat blue dog " * 3, LENGTH: "red cat blue dog " * 12}
# Two lengths sum in another order: 1e-6 at most here. A text that loses a token is off by 1e-2.
SAME_PICTURE = 1e-5
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 1, "output_type": "np"}
PADDING = {"kv": Padding(axis=2, value=0.0), "bias": Padding(axis=1, value=-10.0)}


@pytest.fixture(scope="module")
def long_texts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_checkpoint for texts of LENGTH tokens after an instruction."""

    def make(path: Path) -> None:
        shutil.copytree(tiny_checkpoint, path)
        defaults = json.loads((path / "ditc.json").read_text())
        defaults |= {"max_sequence_length": LENGTH, "complex_human_instruction": INSTRUCTION}
        (path / "ditc.json").write_text(json.dumps(defaults))

    return made_once(tmp_path_factory, "long-texts-checkpoint", make)


@pytest.fixture(scope="module")
def bundle(long_texts: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle for ONNX Runtime and OpenVINO."""
    need_openvino()

    def make(path: Path) -> None:
        shutil.copytree(tiny_bundle, path)
        build_bundle(long_texts, path, BuildOptions(max_batch=3, backend=Backend.OPENVINO))

    return made_once(tmp_path_factory, "long-texts-bundle", make)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipeline(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, backend=request.param, threads=1) as loaded:
        yield loaded


def with_padding(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, computing with all padding, as on a GPU."""
    old = pipeline.conditioning
    whole = Conditioning(old.encoders, old.conditioner, key="with padding")
    return Pipeline(pipeline.manifest, pipeline.sessions, whole)


def state_of(pipeline: Pipeline, prompt: str, **arguments: Any) -> DenoiseState:
    (state,) = pipeline.states(pipeline.plan(Request(prompt=prompt, **CALL | arguments)))
    return state


@pytest.mark.parametrize("length", PROMPTS)
def test_a_picture_is_the_same_without_padding(pipeline: Pipeline, length: int) -> None:
    state = state_of(pipeline, PROMPTS[length])
    assert state.rows.text_length == length
    assert state_of(with_padding(pipeline), PROMPTS[length]).rows.text_length == LENGTH
    request = Request(prompt=PROMPTS[length], **CALL)
    difference = pipeline.draw(request).images - with_padding(pipeline).draw(request).images
    assert np.abs(difference).max() <= SAME_PICTURE


@pytest.mark.parametrize("negative_prompt", ["", PROMPTS[64]])
def test_a_picture_without_padding_is_that_of_diffusers(
    pipeline: Pipeline, long_texts: Path, negative_prompt: str
) -> None:
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 3,
        "negative_prompt": negative_prompt,
    }
    theirs = Reference(long_texts).draw("red cat", height=64, width=64, **settings)
    assert_same(draw(pipeline, "red cat", height=64, width=64, **settings), theirs)


def test_the_text_encoder_gets_no_more_tokens_than_it_needs(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    session = pipeline.sessions[TEXT_ENCODER]
    run = session.run
    monkeypatch.setattr(session, "run", lambda feeds: seen.append(feeds["input_ids"].shape) or run(feeds))
    pipeline.conditioning.cache.clear()
    state_of(pipeline, PROMPTS[64])
    (encoder,) = pipeline.conditioning.encoders
    instruction = encoder.spec.max_length - LENGTH
    assert seen == [(1, instruction + 64), (1, 32)]


def short_and_padded(pipeline: Pipeline, **arguments: Any) -> list[np.ndarray]:
    """Pictures from embeddings of 7 tokens, alone and followed by 4 that the mask hides."""
    width = pipeline.conditioning.conditioner.spec.input("text_embeds").shape[2]
    short = np.random.default_rng(0).standard_normal((1, 7, width)).astype(np.float32)
    padded = np.concatenate([short, np.ones((1, 4, width), np.float32)], axis=1)
    mask = (np.arange(11) < 7).astype(np.int64)[None]
    return [
        pipeline.draw(
            Request(
                prompt_embeds=embeds,
                prompt_attention_mask=mask[:, : embeds.shape[1]],
                **CALL,
                **arguments,
            )
        ).images
        for embeds in (short, padded)
    ]


def test_embeddings_may_be_shorter_than_the_negative_prompt(pipeline: Pipeline) -> None:
    short, padded = short_and_padded(pipeline)
    assert np.abs(short - padded).max() <= SAME_PICTURE


def test_a_controlnet_gets_rows_of_the_same_length(control_bundle: Path) -> None:
    with Pipeline.load(control_bundle, threads=1) as pipeline:
        assert set(pipeline.conditioning.padding) == {"cross_kv", "text_bias", "control_kv"}
        short, padded = short_and_padded(pipeline, control_image=Image.new("RGB", (64, 64), "red"))
        assert np.abs(short - padded).max() <= SAME_PICTURE


def test_videos_have_rows_of_different_lengths_too(video_bundle: Path) -> None:
    with Pipeline.load(video_bundle, threads=1) as pipeline:
        short, padded = short_and_padded(pipeline, frames=5)
        assert np.abs(short - padded).max() <= SAME_PICTURE


def test_texts_of_different_lengths_share_a_run(pipeline: Pipeline) -> None:
    states = [state_of(pipeline, prompt) for prompt in PROMPTS.values()]
    assert len({batch_key(state) for state in states}) == 1
    alone = [Batch(pipeline.sessions[DENOISER]).step([state])[0] for state in states]
    batch = Batch(pipeline.sessions[DENOISER])
    for together in (batch.step(states), batch.step(states[::-1])[::-1], batch.step(states)):
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(to_numpy(one.latents), to_numpy(other.latents), atol=SAME_PICTURE)


def test_openvino_compiles_once_for_texts_of_all_lengths(bundle: Path) -> None:
    with Pipeline.load(bundle, backend="openvino", threads=1) as pipeline:
        session = pipeline.sessions[DENOISER]
        assert isinstance(session, OpenvinoSession)
        compiled = []
        for prompt in PROMPTS.values():
            Batch(session).step([state_of(pipeline, prompt)])
            compiled.append(session.last_compiled())
        assert compiled[0] is compiled[1] is compiled[2]
        (latents,) = [port for port in compiled[0].inputs if port.get_any_name() == "latents"]
        assert latents.get_partial_shape().is_static


def row(value: float, tokens: int) -> dict[str, np.ndarray]:
    return {
        "kv": np.full((1, 2, tokens, 3), value, np.float32),
        "bias": np.full((1, tokens), value, np.float32),
        "pooled": np.full((1, 4), value, np.float32),
    }


def test_short_rows_are_filled_up_to_the_longest_with_what_hides_them() -> None:
    stacked = stack_texts([row(1, 2), row(2, 4)], PADDING)
    assert stacked["kv"][0, 0, :, 0].tolist() == [1, 1, 0, 0]
    assert stacked["bias"].tolist() == [[1, 1, -10, -10], [2, 2, 2, 2]]
    assert stacked["pooled"].shape == (2, 4)
    with pytest.raises(UsageError, match="different lengths: 2 and 4 tokens"):
        stack_texts([row(1, 2), row(2, 4)], {})


def test_rows_that_stay_in_a_stack_are_not_copied_when_a_longer_text_leaves(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(value: float, tokens: int) -> Rows:
        return Rows(np.zeros(1, np.int64), row(value, tokens), padding=PADDING)

    stack, short, long, third = RowStack(pipeline.sessions[DENOISER]), rows(1, 2), rows(2, 5), rows(3, 3)
    stack.place([short, long])
    assert to_numpy(stack.tensors["bias"]).tolist() == [[1, 1, -10, -10, -10], [2] * 5]
    written: list[float] = []
    write = RowStack._write
    monkeypatch.setattr(
        RowStack,
        "_write",
        lambda self, start, rows: (
            written.append(float(rows.conditioning["bias"][0, 0])) or write(self, start, rows)
        ),
    )
    stack.place([short, third])
    assert written == [3]
    assert to_numpy(stack.tensors["bias"]).tolist() == [[1, 1, -10, -10, -10], [3, 3, 3, -10, -10]]
    stack.place([third])
    assert to_numpy(stack.tensors["bias"]).tolist() == [[3, 3, 3, -10, -10]]
    stack.place([short])
    assert to_numpy(stack.tensors["bias"]).tolist() == [[1, 1]], "nobody of a longer stack is left"
