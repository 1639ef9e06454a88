"""Opening diffusers checkpoints: whole ones are read lazily, broken ones are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from ditc.export.checkpoint.open import check_finite, open_checkpoint
from ditc.export.checkpoint.release_memory import release_memory
from ditc.export.checkpoint.tensors import read_safetensors
from ditc.runtime.errors import CheckpointError

DPM_SOLVER = "DPMSolverMultistepScheduler"
TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A diffusers directory as Sana's: a seeded transformer, its scheduler and an empty tokenizer."""
    torch.manual_seed(0)
    path = tmp_path / "sana"
    SanaTransformer2DModel(**TINY).save_pretrained(path / "transformer")
    _write(path / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    _write(path / "tokenizer" / "tokenizer.json", {})
    _write(
        path / "model_index.json",
        {
            "_class_name": "SanaPipeline",
            "scheduler": ["diffusers", DPM_SOLVER],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
            "transformer": ["diffusers", "SanaTransformer2DModel"],
            "safety_checker": [None, None],
        },
    )
    return path


def test_a_checkpoint_has_the_saved_configs_tokenizers_defaults_and_weights(
    directory: Path,
) -> None:
    _write(directory / "ditc.json", {"height": 96, "resolution_bins": [[96, 96], [80, 112]]})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.scheduler_config == {"_class_name": DPM_SOLVER, "flow_shift": 3.0}
    assert checkpoint.tokenizers == {"tokenizer": directory / "tokenizer"}
    assert checkpoint.defaults["resolution_bins"] == [[96, 96], [80, 112]]
    transformer = checkpoint.component("transformer")
    assert transformer.config["num_layers"] == 2
    _assert_same(transformer.tensors, _saved(directory))
    check_finite(transformer)


def test_shapes_and_dtypes_come_from_the_header_and_values_are_not_copied(directory: Path) -> None:
    tensors = open_checkpoint(directory).component("transformer").tensors
    name = "patch_embed.proj.weight"
    assert tensors.shape(name) == (16, 4, 1, 1)
    assert tensors.dtype(name) is torch.float32
    assert tensors[name].data_ptr() == tensors[name].data_ptr()  # two views of one memory map
    assert tensors.size_bytes == sum(t.nbytes for t in _saved(directory).values())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_read_like_single_files(directory: Path, variant: str | None) -> None:
    expected = _saved(directory)
    model = SanaTransformer2DModel.from_pretrained(directory / "transformer")
    _clear(directory / "transformer")
    model.save_pretrained(directory / "transformer", max_shard_size="20KB", variant=variant)
    transformer = open_checkpoint(directory, variant=variant).component("transformer")
    assert len(transformer.files) > 1
    _assert_same(transformer.tensors, expected)


def test_a_component_without_the_variant_gives_its_default_files(directory: Path) -> None:
    _add_vae(directory)
    with pytest.raises(CheckpointError, match=r"variant 'bf16'"):
        open_checkpoint(directory, variant="bf16")
    transformer = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.rename(transformer.with_suffix(".fp16.safetensors"))
    checkpoint = open_checkpoint(directory, variant="fp16")
    assert checkpoint.component("vae").files[0].name == "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=r"no weights of the default variant, only .*fp16"):
        open_checkpoint(directory)


def test_a_missing_directory_and_one_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a directory") as caught:
        open_checkpoint(tmp_path / "nothing")
    assert caught.value.hint
    with pytest.raises(CheckpointError, match=r"has no model_index.json"):
        open_checkpoint(tmp_path)


def test_a_missing_component_is_named(directory: Path) -> None:
    (directory / "tokenizer" / "tokenizer.json").unlink()
    (directory / "tokenizer").rmdir()
    with pytest.raises(CheckpointError, match=r"no folder 'tokenizer'"):
        open_checkpoint(directory)


def test_the_error_for_an_unknown_component_lists_the_known_ones(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no component 'vae', only transformer"):
        open_checkpoint(directory).component("vae")


@pytest.mark.parametrize("instead", [True, False])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_beside_or_instead_of_safetensors_are_refused(
    directory: Path, name: str, instead: bool
) -> None:
    transformer = directory / "transformer"
    (transformer / name).write_bytes(b"\x80\x04.")
    if instead:
        (transformer / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"pickle files: {name}") as caught:
        open_checkpoint(directory)
    assert caught.value.hint is not None
    assert ("never read" in caught.value.hint) == instead


@pytest.mark.parametrize("kept", [0, 4, 500, -1])
def test_a_truncated_file_is_refused_before_its_values_are_read(directory: Path, kept: int) -> None:
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(
        CheckpointError, match=r"diffusion_pytorch_model.safetensors is not a whole"
    ) as caught:
        open_checkpoint(directory)
    assert "cut off" in str(caught.value.hint)


def test_a_git_lfs_pointer_is_recognised(directory: Path) -> None:
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert "git lfs pull" in str(caught.value.hint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(directory: Path, bad: float) -> None:
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["caption_projection.linear_1.weight"][1, 2] = bad
    save_file(weights, path)
    transformer = open_checkpoint(directory).component("transformer")
    with pytest.raises(CheckpointError, match=r"transformer/.*: caption_projection.linear_1.weight has 1 of"):
        check_finite(transformer)


def test_shards_that_do_not_fit_their_index_are_refused(directory: Path) -> None:
    model = SanaTransformer2DModel.from_pretrained(directory / "transformer")
    _clear(directory / "transformer")
    model.save_pretrained(directory / "transformer", max_shard_size="20KB")
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    whole = path.read_text()

    index = json.loads(whole)
    index["weight_map"]["extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no shard holds: extra.weight"):
        open_checkpoint(directory)

    index = json.loads(whole)
    del index["weight_map"]["scale_shift_table"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"does not place there: scale_shift_table"):
        open_checkpoint(directory)

    index = json.loads(whole)
    index["weight_map"]["scale_shift_table"] = "../../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not a safetensors file beside it"):
        open_checkpoint(directory)

    path.write_text(whole)
    shard = sorted((directory / "transformer").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of them are missing: {shard.name}"):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"weight_map": 3'])
def test_a_file_that_is_not_a_json_object_is_refused_by_name(directory: Path, text: str) -> None:
    (directory / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model_index.json"):
        open_checkpoint(directory)


def test_a_component_name_cannot_leave_the_checkpoint(directory: Path) -> None:
    _write(directory / "model_index.json", {"../secret": ["diffusers", "AutoencoderDC"]})
    with pytest.raises(CheckpointError, match=r"outside the checkpoint"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "defaults",
    [{"hight": 96}, {"height": "96"}, {"height": True}, {"resolution_bins": [[96]]}, {"guidance_scale": -1}],
)
def test_defaults_with_an_unknown_key_or_a_wrong_value_are_refused(
    directory: Path, defaults: dict[str, object]
) -> None:
    _write(directory / "ditc.json", defaults)
    with pytest.raises(CheckpointError, match=next(iter(defaults))):
        open_checkpoint(directory)


def _add_vae(directory: Path) -> None:
    AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        attention_head_dim=8,
    ).save_pretrained(directory / "vae")
    index = json.loads((directory / "model_index.json").read_text())
    _write(directory / "model_index.json", index | {"vae": ["diffusers", "AutoencoderDC"]})


def _saved(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")


def _clear(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def _assert_same(found: object, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's count of a process's pages")
def test_memory_of_a_read_checkpoint_is_released_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(2**20, dtype=torch.float32)}, file)
    tensor = read_safetensors(file)["weight"].load()

    def resident_kb() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(file))[1:]
        return sum(int(re.search(r"Rss:\s+(\d+) kB", text)[1]) for text in maps)

    total = float(tensor.sum())
    assert resident_kb() >= 4096
    assert release_memory([file]) >= 4 * 2**20
    assert resident_kb() == 0
    assert float(tensor.sum()) == total


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_two_saves_in_one_folder_are_refused_and_both_are_named(
    directory: Path, variant: str | None, stem: str
) -> None:
    """diffusers reads the index and transformers the single file, so either choice would be wrong for one of them."""
    folder = directory / "transformer"
    end = f".{variant}.safetensors" if variant else ".safetensors"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / f"{stem}{end}")
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    _write(folder / index, {"weight_map": {}})
    with pytest.raises(CheckpointError, match="holds 2 saves of the same weights") as caught:
        open_checkpoint(directory, variant=variant)
    assert f"{stem}{end}" in str(caught.value) and index in str(caught.value)


def test_two_files_of_weights_are_refused_whichever_library_they_are_for(directory: Path) -> None:
    folder = directory / "transformer"
    (folder / "model.safetensors").write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors and model.safetensors"):
        open_checkpoint(directory)


def test_other_variants_beside_a_save_are_not_another_save(directory: Path) -> None:
    folder = directory / "transformer"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    _write(folder / "diffusion_pytorch_model.safetensors.index.bf16.json", {"weight_map": {}})
    _assert_same(open_checkpoint(directory).component("transformer").tensors, _saved(directory))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_without_their_index_are_not_taken_for_another_variant(
    directory: Path, variant: str | None
) -> None:
    model = SanaTransformer2DModel.from_pretrained(directory / "transformer")
    if variant is None:
        _clear(directory / "transformer")
    model.save_pretrained(directory / "transformer", max_shard_size="20KB", variant=variant)
    next(iter((directory / "transformer").glob("*.index*"))).unlink()
    with pytest.raises(CheckpointError, match=r"has shards, but of .* neither an index") as caught:
        open_checkpoint(directory, variant=variant)
    assert "index" in str(caught.value.hint)
