"""Native Sana checkpoints become diffusers directories and back, bit for bit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel, SanaVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.convert.layout import DTYPES, NativeOptions
from ditc.export.convert.native import convert, convert_to_native
from ditc.export.convert.native_file import read_native
from ditc.export.families.sana.native import detect_keys
from ditc.runtime.cli import main
from ditc.runtime.errors import CheckpointError, UsageError

HIDDEN, CHANNELS, CAPTION, LAYERS = 16, 4, 12, 2
CONFIG = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": LAYERS,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": HIDDEN,
    "caption_channels": CAPTION,
    "sample_size": 2,
}
OPTIONS = NativeOptions(
    resolution=64,
    flow_shift=3.0,
    position_embedding="none",
    dtype="fp32",
    attention_head_dim=8,
    cross_attention_head_dim=4,
)
TRAINING_ONLY = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")


@pytest.fixture(params=["sana", "sana-1.5", "sprint", "video"])
def network(request: pytest.FixtureRequest) -> SanaTransformer2DModel | SanaVideoTransformer3DModel:
    """A seeded network of each variant. Biases and norms are random too, so no two tensors are equal."""
    return _network(request.param)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_native_checkpoint_becomes_the_same_network_in_diffusers(
    tmp_path: Path, network: SanaTransformer2DModel, suffix: str
) -> None:
    native = _native_names(network) | {name: torch.randn(3, 3) for name in TRAINING_ONLY}
    out = convert(_save(native, tmp_path / f"net{suffix}"), tmp_path / "out", options=_options_of(network))
    expected = network.state_dict()
    _assert_same(open_checkpoint(out).component("transformer").tensors, expected)
    loaded, report = type(network).from_pretrained(out / "transformer", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # Not bit for bit: the weights are at other addresses, and a GEMM's last bits depend on the alignment.
    torch.testing.assert_close(_run(loaded), _run(network))


@pytest.mark.parametrize("outer", ["model", "base_model", "module._orig_mod"])
def test_an_outer_name_that_all_tensors_share_is_removed(tmp_path: Path, outer: str) -> None:
    network = _network("sana")
    native = {f"{outer}.{name}": tensor for name, tensor in _native_names(network).items()}
    out = convert(_save(native, tmp_path / "net.pth"), tmp_path / "out", options=OPTIONS)
    _assert_same(open_checkpoint(out).component("transformer").tensors, network.state_dict())


def test_a_round_trip_from_diffusers_to_native_and_back_is_bit_for_bit(
    tmp_path: Path, network: SanaTransformer2DModel
) -> None:
    options = _options_of(network)
    first = convert(_save(_native_names(network), tmp_path / "net.pth"), tmp_path / "first", options=options)
    native = convert_to_native(first, tmp_path / "native.safetensors")
    _assert_same(load_file(native), _native_names(network))
    second = convert(native, tmp_path / "second", options=options)
    for path in sorted(first.rglob("*.*")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
    # safetensors makes its files private, but these have the permissions that the umask allows.
    config = first / "transformer" / "config.json"
    modes = {path.stat().st_mode for path in (native, config, *first.rglob("*.safetensors"))}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("family", "qk_norm", "guidance"),
    [("sana", False, False), ("sana-1.5", True, False), ("sprint", True, True), ("video", True, False)],
)
def test_the_variant_is_detected_from_keys_not_from_the_path(
    tmp_path: Path, family: str, qk_norm: bool, guidance: bool
) -> None:
    misleading = tmp_path / "SANA1.5_Sprint_4.8B_video.pth"
    keys = detect_keys(read_native(_save(_native_names(_network(family)), misleading)))
    assert (keys.num_layers, keys.qk_norm, keys.guidance_embeds) == (LAYERS, qk_norm, guidance)
    assert keys.video == (family == "video")


def test_the_scheduler_and_the_pipeline_class_follow_the_variant(tmp_path: Path) -> None:
    sana = convert(
        _save(_native_names(_network("sana")), tmp_path / "a.pth"), tmp_path / "a", options=OPTIONS
    )
    config = open_checkpoint(sana).scheduler_config
    assert config["_class_name"] == "DPMSolverMultistepScheduler"
    assert (config["flow_shift"], config["use_flow_sigmas"], config["prediction_type"]) == (
        3.0,
        True,
        "flow_prediction",
    )
    native = _save(_native_names(_network("sprint")), tmp_path / "b.pth")
    sprint = open_checkpoint(convert(native, tmp_path / "b", options=_options(flow_shift=None)))
    assert sprint.model_index["_class_name"] == "SanaSprintPipeline"
    assert sprint.scheduler_config["_class_name"] == "SCMScheduler"
    network = _network("video")
    native = _save(_native_names(network), tmp_path / "c.pth")
    video = open_checkpoint(convert(native, tmp_path / "c", options=_options_of(network)))
    assert video.model_index["_class_name"] == "SanaVideoPipeline"
    assert video.scheduler_config["flow_shift"] == 8.0
    assert video.component("transformer").config["sample_size"] == 30


def test_one_error_names_every_setting_that_the_tensors_do_not_show(tmp_path: Path) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    with pytest.raises(UsageError) as caught:
        convert(path, tmp_path / "out", options=NativeOptions())
    assert str(caught.value).endswith("also give --resolution, --position-embedding, --dtype, --flow-shift")
    assert "4096 px: --flow-shift 6" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"--interpolation-scale"):
        convert(path, tmp_path / "out", options=_options(position_embedding="sincos"))
    with pytest.raises(UsageError, match=r"head sizes of a network with hidden size 16"):
        convert(path, tmp_path / "out", options=_options(attention_head_dim=None))
    for bad in ({"resolution": 100}, {"flow_shift": -1.0}, {"dtype": "int4"}, {"attention_head_dim": 5}):
        with pytest.raises(UsageError, match="--"):
            convert(path, tmp_path / "out", options=_options(**bad))
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pth"]


def test_the_options_of_a_video_network_are_other_ones(tmp_path: Path) -> None:
    path = _save(_native_names(_network("video")), tmp_path / "net.pth")
    with pytest.raises(UsageError, match=r"also give --resolution, --flow-shift, --dtype$"):
        convert(path, tmp_path / "out", options=NativeOptions())
    for bad, message in (
        ({"resolution": 512}, "--resolution 512 is not one of 480, 720"),
        (
            {"resolution": 480, "position_embedding": "sincos"},
            "--position-embedding sincos is of image networks",
        ),
        ({"resolution": 480, "dtype": "int4"}, "--dtype int4"),
        ({"resolution": 480, "attention_head_dim": None}, "head sizes of a network with hidden size 16"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(path, tmp_path / "out", options=_options(**bad))


def test_a_position_embedding_is_written_as_its_interpolation_scale(tmp_path: Path) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    options = _options(position_embedding="sincos", interpolation_scale=2.0)
    config = open_checkpoint(convert(path, tmp_path / "out", options=options)).component("transformer").config
    assert config["interpolation_scale"] == 2.0


def test_shards_hold_the_same_weights_as_one_file(tmp_path: Path) -> None:
    network = _network("sana")
    path = _save(_native_names(network), tmp_path / "net.pth")
    out = convert(path, tmp_path / "out", options=OPTIONS, max_shard_bytes=8_000)
    transformer = open_checkpoint(out).component("transformer")
    assert len(transformer.files) > 2
    _assert_same(transformer.tensors, network.state_dict())
    _assert_same(
        SanaTransformer2DModel.from_pretrained(out / "transformer").state_dict(), network.state_dict()
    )


def test_weights_are_cast_to_the_dtype_and_overflow_is_refused_by_name(tmp_path: Path) -> None:
    native = _native_names(_network("sana"))
    out = convert(_save(native, tmp_path / "net.pth"), tmp_path / "bf16", options=_options(dtype="bf16"))
    found = open_checkpoint(out).component("transformer").tensors
    assert {found.dtype(name) for name in found} == {torch.bfloat16}
    native["blocks.1.attn.proj.bias"][3] = 1e6
    path = _save(native, tmp_path / "large.pth")
    with pytest.raises(
        CheckpointError, match=r"transformer_blocks.1.attn1.to_out.0.bias has 1 values too large"
    ):
        convert(path, tmp_path / "fp16", options=_options(dtype="fp16"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bf16", "large.pth", "net.pth"]


def test_the_other_components_are_copied_from_a_base_checkpoint(tmp_path: Path) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    base = convert(path, tmp_path / "base", options=OPTIONS)
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(
        json.dumps(index | {"tokenizer": ["transformers", "GemmaTokenizerFast"]})
    )
    out = open_checkpoint(convert(path, tmp_path / "out", options=OPTIONS, base=base))
    assert out.tokenizers == {"tokenizer": tmp_path / "out" / "tokenizer"}
    assert (out.tokenizers["tokenizer"] / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("key", ["state_dict", None])
def test_weights_inside_a_training_file_are_read_and_ema_is_an_option(
    tmp_path: Path, key: str | None
) -> None:
    native = _native_names(_network("sana"))
    averaged = {name: tensor + 1 for name, tensor in native.items()}
    training = {"state_dict": native, "state_dict_ema": averaged, "optimizer": {"lr": 0.1}, "epoch": 3}
    torch.save(training if key else native, tmp_path / "net.pth")
    _assert_same(read_native(tmp_path / "net.pth"), native)
    if key:
        _assert_same(read_native(tmp_path / "net.pth", ema=True), averaged)
    else:
        with pytest.raises(CheckpointError, match=r"has no state_dict_ema"):
            read_native(tmp_path / "net.pth", ema=True)


def test_torchs_format_before_zip_files_is_read_too(tmp_path: Path) -> None:
    native = _native_names(_network("sana"))
    torch.save({"state_dict": native}, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    _assert_same(read_native(tmp_path / "net.pth"), native)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pth_that_holds_code_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    value = {"state_dict": {"x_embedder.proj.weight": Trap(tmp_path / "ran")}}
    if plain:
        (tmp_path / "net.pth").write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"more than plain tensors") as caught:
        convert(tmp_path / "net.pth", tmp_path / "out", options=OPTIONS)
    assert "model.state_dict()" in str(caught.value.hint)
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[1, 2], {}, {"state_dict": {"a": 3}}, {"state_dict": [torch.ones(1)]}])
def test_a_pth_without_a_state_dict_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net.pth"):
        read_native(tmp_path / "net.pth")


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_pth_is_refused(tmp_path: Path, kept: int) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"net.pth is not a whole torch file \({kept} bytes"):
        read_native(path)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    whole = _native_names(_network("sana-1.5"))

    def refused(change: dict[str, torch.Tensor | None]) -> str:
        changed = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        with pytest.raises(CheckpointError) as caught:
            convert(_save(changed, tmp_path / "net.pth"), tmp_path / "out", options=OPTIONS)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "missing: blocks.1.cross_attn.kv_linear.bias" in refused(
        {"blocks.1.cross_attn.kv_linear.bias": None}
    )
    assert "missing: blocks.0.attn.q_norm.weight" in refused({"blocks.0.attn.q_norm.weight": None})
    assert "unknown: blocks.0.extra" in refused({"blocks.0.extra": torch.ones(1)})
    assert "not numbered 0 to 2" in refused({"blocks.999999999.x": torch.ones(1)})
    assert "blocks.1.attn.proj.weight gives" in refused({"blocks.1.attn.proj.weight": torch.ones(3, 16)})
    assert "cannot be split into 3 equal parts" in refused({"blocks.1.attn.qkv.weight": torch.ones(47, 16)})
    assert "x_embedder.proj.weight is [16]" in refused({"x_embedder.proj.weight": torch.ones(16)})


def test_other_networks_are_refused_and_the_error_says_what_they_are(tmp_path: Path) -> None:
    for tensors, message in (
        ({"blocks.0.mlp.t_conv.weight": torch.ones(1)}, "x_embedder.proj.weight is missing"),
        (
            {"double_blocks.0.img_mod.lin.weight": torch.ones(1)},
            "no family has tensors of these names.*double_blocks",
        ),
        (_network("sana").state_dict(), "diffusers' names already"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(_save(tensors, tmp_path / "net.safetensors"), tmp_path / "out", options=OPTIONS)


def test_the_error_for_a_native_file_as_a_checkpoint_points_to_ditc_convert(tmp_path: Path) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "ditc convert" in str(caught.value.hint)


def test_the_error_for_a_directory_points_to_to_native_and_a_missing_file_is_named(
    tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    (tmp_path / "checkpoint").mkdir()
    assert main(["convert", str(tmp_path / "checkpoint"), str(out)]) == 2
    assert (
        "hint: to convert a diffusers directory to a native file, add --to-native" in capsys.readouterr().err
    )
    for missing in ("net.pth", "net.safetensors", "net"):
        assert main(["convert", str(tmp_path / missing), str(out)]) == 2
        assert f"{missing} does not exist" in capsys.readouterr().err


def test_an_output_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        convert_to_native("nowhere", tmp_path / "file" / "out.safetensors")
    for place in (tmp_path / "file" / "out", tmp_path / ("x" * 256)):
        with pytest.raises(UsageError, match="cannot write"):
            convert(Path("nowhere.pth"), place, options=OPTIONS)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match=r"exists already"):
        convert(path, tmp_path / "out", options=OPTIONS)


def test_the_command_line_passes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _save(_native_names(_network("sana")), tmp_path / "net.pth")
    line = f"convert {path} {tmp_path / 'out'} --resolution 64 --flow-shift 3 --position-embedding none"
    assert main(line.split()) == 2
    assert "also give --dtype" in capsys.readouterr().err
    for dtype in DTYPES:
        heads = ["--attention-head-dim", "8", "--cross-attention-head-dim", "4"]
        assert main([*line.replace("/out", f"/{dtype}").split(), "--dtype", dtype, *heads]) == 0
        assert capsys.readouterr().out == f"{tmp_path / dtype}\n"
    assert main(["convert", "--to-native", str(tmp_path / "fp32"), str(tmp_path / "back.safetensors")]) == 0
    _assert_same(load_file(tmp_path / "back.safetensors"), _native_names(_network("sana")))


def _network(family: str) -> SanaTransformer2DModel | SanaVideoTransformer3DModel:
    torch.manual_seed(0)
    if family == "video":
        network = SanaVideoTransformer3DModel(**CONFIG | {"sample_size": 30, "mlp_ratio": 3.0}).eval()
        return _random(network)
    extra: dict[str, Any] = {} if family == "sana" else {"qk_norm": "rms_norm_across_heads"}
    if family == "sprint":
        extra["guidance_embeds"] = True
    return _random(SanaTransformer2DModel(**CONFIG, **extra).eval())


@torch.no_grad()
def _random(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    return network


def _native_names(network: SanaTransformer2DModel) -> dict[str, torch.Tensor]:
    """The network's weights with NVlabs/Sana's names, written out here independently of the table under test."""
    w = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    video = isinstance(network, SanaVideoTransformer3DModel)
    patches = "patch_embedding" if video else "patch_embed.proj"
    time = "time_embed" if network.config.guidance_embeds else "time_embed.emb"
    native = {
        "attention_y_norm.weight": w["caption_norm.weight"],
        "final_layer.scale_shift_table": w["scale_shift_table"],
    }
    for kind in ("weight", "bias"):
        native[f"x_embedder.proj.{kind}"] = w[f"{patches}.{kind}"]
        native[f"y_embedder.y_proj.fc1.{kind}"] = w[f"caption_projection.linear_1.{kind}"]
        native[f"y_embedder.y_proj.fc2.{kind}"] = w[f"caption_projection.linear_2.{kind}"]
        native[f"t_embedder.mlp.0.{kind}"] = w[f"{time}.timestep_embedder.linear_1.{kind}"]
        native[f"t_embedder.mlp.2.{kind}"] = w[f"{time}.timestep_embedder.linear_2.{kind}"]
        native[f"t_block.1.{kind}"] = w[f"time_embed.linear.{kind}"]
        native[f"final_layer.linear.{kind}"] = w[f"proj_out.{kind}"]
        if network.config.guidance_embeds:
            native[f"cfg_embedder.mlp.0.{kind}"] = w[f"time_embed.guidance_embedder.linear_1.{kind}"]
            native[f"cfg_embedder.mlp.2.{kind}"] = w[f"time_embed.guidance_embedder.linear_2.{kind}"]
    for i in range(LAYERS):
        theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        native[f"{theirs}.scale_shift_table"] = w[f"{ours}.scale_shift_table"]
        native[f"{theirs}.attn.qkv.weight"] = torch.cat([w[f"{ours}.attn1.to_{x}.weight"] for x in "qkv"])
        for kind in ("weight", "bias"):
            native[f"{theirs}.attn.proj.{kind}"] = w[f"{ours}.attn1.to_out.0.{kind}"]
            native[f"{theirs}.cross_attn.q_linear.{kind}"] = w[f"{ours}.attn2.to_q.{kind}"]
            native[f"{theirs}.cross_attn.kv_linear.{kind}"] = torch.cat(
                [w[f"{ours}.attn2.to_k.{kind}"], w[f"{ours}.attn2.to_v.{kind}"]]
            )
            native[f"{theirs}.cross_attn.proj.{kind}"] = w[f"{ours}.attn2.to_out.0.{kind}"]
            native[f"{theirs}.mlp.inverted_conv.conv.{kind}"] = w[f"{ours}.ff.conv_inverted.{kind}"]
            native[f"{theirs}.mlp.depth_conv.conv.{kind}"] = w[f"{ours}.ff.conv_depth.{kind}"]
        native[f"{theirs}.mlp.point_conv.conv.weight"] = w[f"{ours}.ff.conv_point.weight"]
        if video:
            native[f"{theirs}.mlp.t_conv.weight"] = w[f"{ours}.ff.conv_temp.weight"]
        if network.config.qk_norm:
            for x in "qk":
                native[f"{theirs}.attn.{x}_norm.weight"] = w[f"{ours}.attn1.norm_{x}.weight"]
                native[f"{theirs}.cross_attn.{x}_norm.weight"] = w[f"{ours}.attn2.norm_{x}.weight"]
    return native


def _options(**changes: Any) -> NativeOptions:
    return NativeOptions(**({name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | changes))


def _options_of(network: nn.Module) -> NativeOptions:
    if isinstance(network, SanaVideoTransformer3DModel):
        return _options(resolution=480, flow_shift=8.0, position_embedding=None)
    return OPTIONS


def _save(native: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".pth":
        torch.save({"state_dict": native}, path)
    else:
        save_file(native, path)
    return path


@torch.no_grad()
def _run(network: SanaTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    video = isinstance(network, SanaVideoTransformer3DModel)
    latents = torch.randn(1, CHANNELS, *((3, 4, 6) if video else (2, 3)), generator=generator)
    text = torch.randn(1, 5, CAPTION, generator=generator)
    guidance = torch.tensor([4.5]) if network.config.guidance_embeds else None
    return network(latents, text, timestep=torch.tensor([500]), guidance=guidance, return_dict=False)[0]


def _assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
