"""The shipped checkpoint: plain diffusers loads it, nothing but data is in it, and it draws what it drew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.concepts import CHECKPOINT_DIR, DEMO_DIR
from demo.errors import DemoError
from demo.evaluate import defaults, load_pipeline
from demo.train import checkpoint, restore
from demo.train.checkpoint import MAX_BYTES
from demo.train.sheet import SAMPLE_FILE, draw_sample


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(CHECKPOINT_DIR)


def test_plain_diffusers_loads_the_classes_that_real_sana_checkpoints_use(pipeline: Any) -> None:
    classes = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert classes == {
        "tokenizer": "GemmaTokenizer",
        "text_encoder": "Gemma2Model",
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
        "scheduler": "DPMSolverMultistepScheduler",
    }


def test_the_checkpoint_holds_safetensors_and_json_only() -> None:
    suffixes = {f.suffix for f in CHECKPOINT_DIR.rglob("*") if f.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_the_checkpoint_is_within_its_size_limit() -> None:
    assert sum(f.stat().st_size for f in CHECKPOINT_DIR.rglob("*") if f.is_file()) <= MAX_BYTES


def test_every_weight_is_stored_in_16_bits() -> None:
    for path in CHECKPOINT_DIR.rglob("*.safetensors"):
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
        assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} == {"F16"}, path


def test_the_architecture_exercises_the_linear_attention_branches(pipeline: Any) -> None:
    transformer, vae = pipeline.transformer.config, pipeline.vae.config
    assert (transformer.in_channels, transformer.patch_size, transformer.attention_head_dim) == (32, 1, 32)
    assert transformer.qk_norm == "rms_norm_across_heads"
    assert "EfficientViTBlock" in vae.encoder_block_types and "EfficientViTBlock" in vae.decoder_block_types
    latent_tokens = (128 // 2 ** (len(vae.encoder_block_out_channels) - 1)) ** 2
    assert latent_tokens > vae.attention_head_dim  # diffusers takes the quadratic branch up to here


def test_prompts_begin_with_bos_and_are_padded_on_the_right(pipeline: Any) -> None:
    ids = pipeline.tokenizer(["a red heart", ""], padding="max_length", max_length=8).input_ids
    assert [row[0] for row in ids] == [pipeline.tokenizer.bos_token_id] * 2
    assert ids[1][1:] == [pipeline.tokenizer.pad_token_id] * 7


def test_the_stated_defaults_are_what_the_pipeline_accepts(pipeline: Any) -> None:
    arguments = defaults(CHECKPOINT_DIR)
    pipeline.check_inputs("a", arguments["height"], arguments["width"], ["latents"], None, None, None)
    assert set(json.loads((CHECKPOINT_DIR / "ditc.json").read_text())) == {
        "height",
        "width",
        "resolution_bins",
        "max_sequence_length",
        "complex_human_instruction",
        "num_inference_steps",
        "guidance_scale",
    }


def test_a_seeded_picture_matches_the_stored_one(pipeline: Any) -> None:
    drawn = draw_sample(pipeline, CHECKPOINT_DIR).astype(float)
    stored = np.asarray(Image.open(SAMPLE_FILE).convert("RGB"), dtype=float)
    mse = ((drawn - stored) ** 2).mean()
    # Other BLAS kernels change fp32 rounding, which 20 steps carry to ~60 dB; other weights are under 20 dB.
    assert mse == 0 or 10 * np.log10(255**2 / mse) >= 35


def test_the_contact_sheet_is_within_its_size_limit() -> None:
    assert Path(DEMO_DIR / "contact_sheet.png").stat().st_size <= 600_000


def test_restored_states_make_the_same_checkpoint_again(tmp_path: Path) -> None:
    cache, again = tmp_path / "cache", tmp_path / "again"
    cache.mkdir()
    restore.run(cache)
    checkpoint.run(cache, again)
    shipped = _contents(CHECKPOINT_DIR)
    del shipped["recipe.int8.json"]  # ditc calibrate finds it afterwards, for these weights
    assert _contents(again) == shipped
    with pytest.raises(DemoError, match=r"already holds text\.pt"):
        restore.run(cache)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, place = tmp_path / "cache", tmp_path / "place"
    cache.mkdir()
    place.mkdir()
    (place / "model_index.json").write_text("the old one")
    restore.run(cache)

    def full(_: object, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(DemoError, match=r"No space left.*hint: free"):
        checkpoint.run(cache, place)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cache", "place"]
    assert _contents(place) == {"model_index.json": b"the old one"}


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, without the versions of transformers and diffusers that wrote it."""
    stamp = rb'"_?(transformers|diffusers)_version": "[^"]*"'
    return {
        str(f.relative_to(folder)): re.sub(stamp, b"", f.read_bytes())
        if f.suffix == ".json"
        else f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file()
    }
