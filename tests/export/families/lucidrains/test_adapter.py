"""lucidrains/mmdit checkpoints as a user has them: saving, planning, building and drawing, and refusing wrong ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_mmdit import GENERALIZED, TWO, make_checkpoint, t5_and_kl

from ditc.export.build.builder import build_bundle
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, ModelPlan
from ditc.export.families import find_adapter
from ditc.export.families.lucidrains.config import MMDiTConfig
from ditc.export.families.lucidrains.keys import save_mmdit
from ditc.export.families.lucidrains.network import load_mmdit, unused_tensors
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.recipes import find_recipe
from ditc.parity.reference.pytorch import TorchModel
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.metrics import psnr
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.spec import CONDITIONER, DENOISER, Precision

pytest.importorskip("mmdit", reason="the trunk is the mmdit package's: pip install ditc[dev]")
# The project's promise against upstream for the same seed; measured 141 dB.
MIN_PSNR_DB = 45.0


@pytest.fixture
def checkpoint(mmdit_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mmdit_checkpoint, tmp_path / "checkpoint"))


def plan(checkpoint: Path, **options: Any) -> ModelPlan:
    opened = open_checkpoint(checkpoint)
    return find_adapter(opened).plan(opened, BuildOptions(**options))


def change(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def draw_both(bundle: Path, checkpoint: Path, prompt: str, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    with Pipeline.load(bundle) as pipeline:
        return draw_with(pipeline, checkpoint, prompt, size)


def draw_with(
    pipeline: Pipeline, checkpoint: Path, prompt: str, size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The runtime's picture, and the picture of upstream's modules in a plain torch loop, from the same noise."""
    from ditc.parity.reference.lucidrains import open_pipeline

    latents = pipeline.manifest.latents
    shape = (1, latents.channels, size // latents.scale_factor, size // latents.scale_factor)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}
    (ours,) = pipeline(prompt, latents=noise, height=size, width=size, output_type="np", **settings).images
    reference = open_pipeline(open_checkpoint(checkpoint))
    with torch.inference_mode():
        theirs = reference(
            prompt=prompt, latents=torch.from_numpy(noise), max_sequence_length=12, **settings
        ).images[0]
    return np.asarray(ours), theirs


def test_stages_with_the_same_weights_are_reused(mmdit_bundle: Path, tiny_bundle: Path) -> None:
    """The fixture builds in a copy of another family's bundle."""
    ours, other = (load_manifest(bundle).stages for bundle in (mmdit_bundle, tiny_bundle))
    same = {name for name in ours if ours[name].artifacts[0].key == other[name].artifacts[0].key}
    assert set(ours) - same == {CONDITIONER, DENOISER}


def test_the_picture_matches_upstream(mmdit_bundle: Path, mmdit_checkpoint: Path) -> None:
    ours, theirs = draw_both(mmdit_bundle, mmdit_checkpoint, "a red cat with a blue apple")
    assert psnr(ours, theirs) >= MIN_PSNR_DB
    other, _ = draw_both(mmdit_bundle, mmdit_checkpoint, "dog")
    assert psnr(ours, other) < MIN_PSNR_DB  # or else text and mask would not matter


def test_the_picture_matches_upstream_at_another_size(mmdit_bundle: Path, mmdit_checkpoint: Path) -> None:
    ours, theirs = draw_both(mmdit_bundle, mmdit_checkpoint, "a red cat", size=96)
    assert ours.shape == (96, 96, 3) and psnr(ours, theirs) >= MIN_PSNR_DB


@pytest.fixture(scope="module")
def with_t5_and_kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("t5") / "checkpoint", companions=t5_and_kl)


def test_the_picture_with_t5_and_autoencoder_kl_matches_upstream(with_t5_and_kl: Path) -> None:
    """The pipeline runs over PyTorch sessions. Unlike in SD3, T5 does not attend to padding here."""
    index = json.loads((with_t5_and_kl / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    pipeline = TorchModel(with_t5_and_kl).pipeline
    ours, theirs = draw_with(pipeline, with_t5_and_kl, "a red cat")
    assert psnr(ours, theirs) >= MIN_PSNR_DB
    other, _ = draw_with(pipeline, with_t5_and_kl, "blue")
    assert psnr(ours, other) < MIN_PSNR_DB


@pytest.mark.slow
def test_the_picture_from_the_graphs_with_t5_and_autoencoder_kl_matches_upstream(
    with_t5_and_kl: Path, tmp_path: Path
) -> None:
    bundle = build_bundle(with_t5_and_kl, tmp_path / "bundle", BuildOptions()).bundle
    assert psnr(*draw_both(bundle, with_t5_and_kl, "a red cat")) >= MIN_PSNR_DB


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("vae", {"_class_name": "AutoencoderTiny"}, "saved by 'AutoencoderTiny'"),
        ("vae", {"latent_channels": 4}, "the VAE's latents have 4 channels"),
        ("text_encoder", {"d_model": 64}, "the text encoder's states have 64 channels"),
    ],
)
def test_companions_that_do_not_fit_are_refused(
    with_t5_and_kl: Path, tmp_path: Path, folder: str, values: dict[str, Any], message: str
) -> None:
    checkpoint = Path(shutil.copytree(with_t5_and_kl, tmp_path / "checkpoint"))
    path = checkpoint / folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=message):
        plan(checkpoint)


@pytest.mark.slow
def test_the_picture_of_the_generalized_trunk_with_four_streams_matches_upstream(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", trunk=GENERALIZED)
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    build_bundle(checkpoint, out, BuildOptions())
    assert psnr(*draw_both(out, checkpoint, "a red cat")) >= MIN_PSNR_DB


@pytest.mark.parametrize(
    "trunk", [TWO, GENERALIZED, {**TWO, "num_register_tokens": 0, "num_residual_streams": 4}]
)
def test_every_tensor_is_either_read_or_listed_as_unused(trunk, tmp_path: Path) -> None:
    component = open_checkpoint(make_checkpoint(tmp_path / "c", trunk=trunk)).component("transformer")
    config = MMDiTConfig.from_json(component.config)
    networks = load_mmdit(config, component.tensors, torch.float32)
    read = {name for network in networks for name in network.state_dict()}
    unused = set(unused_tensors(config, component.tensors))
    assert not read & unused and read | unused == set(component.tensors)
    last = f"trunk.blocks.{trunk['depth'] - 1}."
    assert all(name.startswith((last, "trunk.norms.0.", "trunk.register_tokens")) for name in unused)


def test_unknown_and_missing_tensors_are_refused(mmdit_checkpoint: Path) -> None:
    component = open_checkpoint(mmdit_checkpoint).component("transformer")
    tensors = {name: component.tensors[name] for name in component.tensors}
    config = MMDiTConfig.from_json(component.config)
    with pytest.raises(CheckpointError, match=r"unknown tensor trunk\.blocks\.0\.extra"):
        load_mmdit(config, {**tensors, "trunk.blocks.0.extra": torch.zeros(1)}, torch.float32)
    del tensors["trunk.blocks.0.joint_attn.to_qkv.0.weight"]
    with pytest.raises(CheckpointError, match=r"lacks trunk\.blocks\.0\.joint_attn\.to_qkv\.0\.weight"):
        load_mmdit(config, tensors, torch.float32)


def test_specs_agree_between_connected_stages(mmdit_checkpoint: Path) -> None:
    made = plan(mmdit_checkpoint, max_batch=3)
    conditioner, denoiser = made.stages[CONDITIONER].spec, made.stages[DENOISER].spec
    for output in conditioner.outputs:
        assert denoiser.input(output.name) == output
    assert denoiser.profile["rows"].max == 6 and made.defaults.num_inference_steps == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 2}, "unknown setting depth"),
        ({"trunk_class": "MMDiTX"}, "trunk_class is 'MMDiTX'"),
        ({"trunk": {**TWO, "qk_norm": True}}, "qk_norm = True, which MMDiT of mmdit 0.3.0 does not take"),
        ({"trunk": {k: v for k, v in TWO.items() if k != "dim_cond"}}, "trunk lacks dim_cond"),
        ({"trunk": {**TWO, "ff_kwargs": {"solu": True}}}, "solu = True"),
        ({"caption_channels": 32}, "the text encoder's states have 24 channels"),
        ({"patch_size": 3}, "patch_size 3 does not divide"),
        (
            {"trunk_class": "GeneralizedMMDiT", "trunk": {**GENERALIZED, "dim_modalities": [24, 32, 16]}},
            "this trunk has 3",
        ),
        (
            {
                "trunk_class": "GeneralizedMMDiT",
                "trunk": {**GENERALIZED, "mhc_kwargs": {"sinkhorn_iters": 5}},
            },
            "sinkhorn_iters = 5",
        ),
        (
            {"trunk_class": "GeneralizedMMDiT", "trunk": {**GENERALIZED, "flash_attn": True}},
            "upstream does not allow softclamp and flash_attn together",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_before_weights_are_read(
    checkpoint: Path, values: dict[str, Any], message: str
) -> None:
    change(checkpoint, **values)
    with pytest.raises(CheckpointError, match=message):
        plan(checkpoint)


@pytest.mark.parametrize(
    "name", ["sample_size", "patch_size", "in_channels", "out_channels", "caption_channels"]
)
def test_a_setting_that_upstream_has_no_default_for_must_be_there(checkpoint: Path, name: str) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        plan(checkpoint)


def test_tf32_is_refused(mmdit_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="tf32 is not available for lucidrains/mmdit"):
        plan(mmdit_checkpoint, precision=Precision.TF32)


def test_saving_without_the_other_components_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no folder text_encoder, tokenizer, vae, scheduler"):
        save_mmdit(tmp_path, config={}, trunk={}, shell={})
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_transformer_is_refused(checkpoint: Path) -> None:
    before = (checkpoint / "transformer" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save_mmdit(checkpoint, config={}, trunk={}, shell={})
    assert (checkpoint / "transformer" / "config.json").read_bytes() == before


def test_saving_weights_that_do_not_fit_leaves_no_transformer(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "transformer")
    config = {
        "trunk_class": "MMDiT",
        "trunk": TWO,
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 1,
        "sample_size": 32,
        "caption_channels": 24,
    }
    with pytest.raises(CheckpointError, match="the weights have 0 layers"):
        save_mmdit(checkpoint, config=config, trunk={}, shell={})
    assert not (checkpoint / "transformer").exists()


@pytest.mark.parametrize("trunk", [TWO, GENERALIZED])
def test_the_int8_recipe_names_every_gemm_of_the_blocks_and_nothing_else(
    trunk: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", trunk=trunk))
    adapter = find_adapter(checkpoint)
    options = BuildOptions()
    stage = adapter.load(checkpoint, adapter.plan(checkpoint, options), DENOISER, options)
    layers = quantizable_layers(stage)
    chosen = set(find_recipe(None, Precision.INT8, adapter.family).formats(layers))
    blocks = {name for name in layers if ".joint_attn." in name or ".ff." in name}
    assert (
        chosen == blocks and {"proj_out", "patch_embed.proj", "time_embed.linear_1"} <= set(layers) - chosen
    )


def code_of_the_page() -> list[str]:
    """The Python blocks of docs/mmdit.md."""
    page = (Path(__file__).parents[4] / "docs" / "mmdit.md").read_text(encoding="utf-8")
    return [block.split("```")[0] for block in page.split("```python\n")[1:]]


def test_the_code_in_the_docs_saves_a_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdit.mmdit_pytorch import MMDiT

    tensors = open_checkpoint(checkpoint).component("transformer").tensors
    shell = {name: tensors[name].clone() for name in tensors if not name.startswith("trunk.")}
    shutil.rmtree(checkpoint / "transformer")
    checkpoint.rename(checkpoint.with_name("my-model"))
    monkeypatch.chdir(checkpoint.parent)
    exec(code_of_the_page()[0], {"MMDiT": MMDiT, "shell": SimpleNamespace(state_dict=lambda: shell)})
    assert plan(Path("my-model")).family == "mmdit"


@pytest.mark.slow
def test_the_code_in_the_docs_exports_a_trunk_of_three_modalities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdit.mmdit_generalized_pytorch import MMDiT

    upstream = MMDiT(depth=1, dim_modalities=(24, 32, 16), dim_cond=12, heads=2, dim_head=8)
    monkeypatch.chdir(tmp_path)
    # to_onnx compares the graph with PyTorch.
    exec(code_of_the_page()[1], {"state_dict": upstream.state_dict()})
    assert Path("trunk.onnx").is_file()
