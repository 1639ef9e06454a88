"""The same LoRA under the names of every program gives the same weights, bit for bit, at build and when loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditc.export.checkpoint.loras import read_choices, with_loras
from ditc.export.checkpoint.open import Checkpoint, open_checkpoint
from ditc.export.families import find_family
from ditc.parity.folded_loras import in_diffusers_form
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.lora.lora import ScaledLora
from ditc.runtime.lora.lora_file import CONFIG, read_lora
from ditc.runtime.lora.reopener import Reopener
from ditc.runtime.lora.stage_weights import changed_initializers

RANK, ALPHA = 3, 7.0
SANA = {
    "blocks.0.attn.qkv": [f"transformer_blocks.0.attn1.to_{n}" for n in "qkv"],
    "blocks.1.attn.proj": ["transformer_blocks.1.attn1.to_out.0"],
    "blocks.1.cross_attn.kv_linear": [f"transformer_blocks.1.attn2.to_{n}" for n in "kv"],
    "blocks.0.mlp.inverted_conv.conv": ["transformer_blocks.0.ff.conv_inverted"],
    "x_embedder.proj": ["patch_embed.proj"],
    "t_block.1": ["time_embed.linear"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "final_layer.linear": ["proj_out"],
}
SD3 = {
    "joint_blocks.0.context_block.attn.qkv": [
        f"transformer_blocks.0.attn.add_{n}_proj" for n in ("q", "k", "v")
    ],
    "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],  # shift before scale, and in diffusers after it
    "context_embedder": ["context_embedder"],  # the same name in both
}
SWAPPED = {"final_layer.adaLN_modulation.1"}
TABLES = {"sana": SANA, "sd3": SD3}
FORMS = ("native", "peft", "peft of diffusers", "ComfyUI", "kohya", "kohya of diffusers", "bare")


def matrices(checkpoint: Checkpoint, table: dict[str, list[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Seeded A and B of each native module."""
    tensors = checkpoint.component("transformer").tensors
    torch.manual_seed(0)
    found = {}
    for module, parts in table.items():
        shape = tensors.shape(f"{parts[0]}.weight")
        ones = (1,) * (len(shape) - 2)
        down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0] * len(parts), RANK, *ones)
        found[module] = (down, up)
    return found


def as_diffusers(pairs: dict[str, tuple[Tensor, Tensor]], table: dict[str, list[str]]) -> dict[str, Tensor]:
    """The matrices under diffusers' names, without a component."""
    tensors = {}
    for module, (down, up) in pairs.items():
        if module in SWAPPED:
            up = torch.cat(up.chunk(2)[::-1])
        for part, rows in zip(table[module], up.chunk(len(table[module])), strict=True):
            tensors[f"{part}.lora_A.weight"] = down.clone()
            tensors[f"{part}.lora_B.weight"] = rows.contiguous()
    return tensors


def kohya(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    named = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        end = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}[kind]
        named[f"{prefix}{module.replace('.', '_')}.{end}"] = tensor
    return named


def with_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = {key.rsplit(".", 2)[0] for key in tensors}
    return {**tensors, **{f"{module}.alpha": torch.tensor(ALPHA) for module in modules}}


def write(form: str, checkpoint: Checkpoint, table: dict[str, list[str]], folder: Path) -> Path:
    """The same LoRA in one of the forms."""
    pairs = matrices(checkpoint, table)
    native = {f"{m}.lora_{n}.weight": t for m, pair in pairs.items() for n, t in zip("AB", pair, strict=True)}
    theirs = as_diffusers(pairs, table)
    metadata = None
    if form == "diffusers":
        tensors = {f"transformer.{key}": tensor for key, tensor in theirs.items()}
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA})}
    elif form == "native":
        tensors = with_alphas(native)
    elif form == "bare":
        tensors = with_alphas(theirs)
    elif form == "ComfyUI":
        tensors = with_alphas({f"diffusion_model.{key}": tensor for key, tensor in native.items()})
    elif form == "kohya":
        tensors = with_alphas(kohya(native, "lora_unet_"))
    elif form == "kohya of diffusers":
        tensors = with_alphas(kohya(theirs, "lora_transformer_"))
    else:
        own = theirs if form == "peft of diffusers" else native
        tensors = {f"base_model.model.{key}": tensor for key, tensor in own.items()}
        modules = sorted({key.rsplit(".", 2)[0] for key in own})
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 2,
            "rank_pattern": dict.fromkeys(modules, RANK),
            "alpha_pattern": {f"^{module}": ALPHA for module in modules},
            "target_modules": "(a+)+$",  # never read
        }
        (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / "style.safetensors", metadata)
    return folder / "style.safetensors"


@pytest.fixture(params=TABLES)
def family(request: pytest.FixtureRequest) -> tuple[Checkpoint, dict[str, list[str]], Path | None]:
    """A checkpoint, its table, and for one of them a bundle."""
    name = {"sana": "tiny_checkpoint", "sd3": "sd3_checkpoint"}[request.param]
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    bundle = request.getfixturevalue("tiny_bundle") if request.param == "sana" else None
    return checkpoint, TABLES[request.param], bundle


def test_every_form_gives_the_weights_of_the_same_lora_in_diffusers_form(family, tmp_path: Path) -> None:
    checkpoint, table, bundle = family
    changed = {f"{part}.weight" for parts in table.values() for part in parts}
    native = find_family(checkpoint).native_names(checkpoint)
    results = {}
    for form in ("diffusers", *FORMS):
        folder = tmp_path / form
        folder.mkdir()
        file = write(form, checkpoint, table, folder)
        loras = read_choices([LoraChoice(file, 0.7)], checkpoint, native)
        assert set(loras[0].lora.components["transformer"]) == changed, form
        folded = with_loras(checkpoint, loras).component("transformer").tensors
        results[form] = {name: folded[name].numpy() for name in changed}
        if bundle is not None:
            results[form] |= at_run_time(bundle, file)
    plain = checkpoint.component("transformer").tensors
    assert all(np.abs(results["diffusers"][n] - plain[n].numpy()).max() > 0.01 for n in changed)
    for form in FORMS:
        assert results[form].keys() == results["diffusers"].keys()
        for name, values in results[form].items():
            np.testing.assert_array_equal(values, results["diffusers"][name], err_msg=f"{form}: {name}")


def at_run_time(bundle: Path, file: Path) -> dict[str, np.ndarray]:
    """The changed initializers of the bundle's stages."""
    manifest = load_manifest(bundle)
    artifacts = {name: stage.artifacts[0] for name, stage in manifest.stages.items()}
    reopener = Reopener(bundle, manifest, artifacts, LoadOptions())
    stages = reopener.stages_of([ScaledLora(reopener.resolved(read_lora(file)), 0.7)])
    assert set(stages) == {"conditioner", "denoiser"}
    return {
        f"{stage}: {name}": array
        for stage, changes in stages.items()
        for graph in reopener.graphs(stage)
        for name, array in changed_initializers(reopener._stored(bundle, graph), changes)
    }


def test_the_native_names_are_those_of_the_native_network(family, tmp_path: Path) -> None:
    """The product is added to the fused tensor of the converted checkpoint, as training of the native network does."""
    checkpoint, table, _ = family
    row = find_family(checkpoint)
    file = write("native", checkpoint, table, tmp_path)
    native = row.native_names(checkpoint)
    folded = with_loras(checkpoint, read_choices([LoraChoice(file, 0.7)], checkpoint, native))
    assert row.layout is not None
    plain, got = row.layout.to_native(checkpoint), row.layout.to_native(folded)
    prefix = "" if next(iter(table)) + ".weight" in plain else "model.diffusion_model."
    for module, (down, up) in matrices(checkpoint, table).items():
        own = plain[f"{prefix}{module}.weight"].float()
        wanted = own + 0.7 * ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).view(own.shape)
        # fp32 products of three terms, summed in another order.
        torch.testing.assert_close(got[f"{prefix}{module}.weight"].float(), wanted, rtol=1e-5, atol=1e-5)


def test_diffusers_gets_the_names_that_it_reads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    own = write("diffusers", checkpoint, SANA, tmp_path)
    assert in_diffusers_form(LoraChoice(own), checkpoint, tmp_path) == own
    (tmp_path / "other").mkdir()
    written = in_diffusers_form(
        LoraChoice(write("peft", checkpoint, SANA, tmp_path / "other")), checkpoint, tmp_path
    )
    got, wanted = load_file(written), load_file(own)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        factor = np.float32(ALPHA / RANK) if name.endswith("lora_B.weight") else np.float32(1)
        torch.testing.assert_close(got[name], tensor * float(factor), rtol=1e-6, atol=0)


def test_dora_of_a_fused_module_has_the_lengths_of_its_rows(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    native = find_family(checkpoint).native_names(checkpoint)
    (module, (down, up)), *_ = matrices(checkpoint, SANA).items()
    lengths = torch.rand(up.shape[0]) + 0.5
    parts = as_diffusers({module: (down, up)}, SANA)
    split = zip(SANA[module], lengths.chunk(3), strict=True)
    theirs = parts | {f"{part}.lora_magnitude_vector": rows.contiguous() for part, rows in split}
    save_file({f"transformer.{name}": t for name, t in theirs.items()}, tmp_path / "a.safetensors")
    own = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": lengths}
    save_file({f"{module}.{name}": tensor for name, tensor in own.items()}, tmp_path / "b.safetensors")
    folded = [
        with_loras(checkpoint, read_choices([LoraChoice(tmp_path / name)], checkpoint, native))
        .component("transformer")
        .tensors
        for name in ("a.safetensors", "b.safetensors")
    ]
    for part in SANA[module]:
        first, second = (tensors[f"{part}.weight"] for tensors in folded)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


A, B = torch.ones(2, 32), torch.ones(96, 2)
KEY = "blocks.0.attn.qkv"
PEFT = {f"base_model.model.{KEY}.lora_A.weight": A, f"base_model.model.{KEY}.lora_B.weight": B}
CONFIGS: dict[str, tuple[object, str]] = {
    "none": (None, "base_model.model.blocks.0.attn.qkv, whose alpha is in adapter_config.json"),
    "no JSON": ("{", "adapter_config.json is not JSON"),
    "a list": ([], "is not JSON: it is not an object"),
    "too large": (" " * 2**20 + "{}", "bytes, and at most 1048576 are read"),
    "another method": ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
    "an expression for alpha": ({"alpha_pattern": {"(a+)+$": 1}}, "the alpha_pattern '(a+)+$' is a regular"),
    "an expression for the rank": ({"rank_pattern": {".*qkv": 2}}, "the rank_pattern '.*qkv' is a regular"),
    "a list of patterns": ({"rank_pattern": [2]}, "the rank_pattern is [2]"),
    "another rank": ({"r": 3}, f"the rank of base_model.model.{KEY} is 3, but its matrices have 2"),
    "another rank here": ({"r": 2, "rank_pattern": {"attn.qkv": 4}}, f"base_model.model.{KEY} is 4"),
    "no number": ({"lora_alpha": "x"}, f"the alpha of base_model.model.{KEY} is 'x'"),
    "no float": ({"lora_alpha": 10**400}, f"the alpha of base_model.model.{KEY} is 1000"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "began with pissa"),
    "another product": ({"use_qalora": True}, "trained with use_qalora"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_peft_that_are_not_applied_are_named(name, tmp_path: Path) -> None:
    config, words = CONFIGS[name]
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / CONFIG).write_text(text)
    save_file(PEFT, tmp_path / "style.safetensors")
    with pytest.raises(UsageError) as refused:
        read_lora(tmp_path / "style.safetensors")
    assert words in str(refused.value) and refused.value.hint


def test_the_settings_of_peft_are_part_of_the_hash(tmp_path: Path) -> None:
    save_file(PEFT, tmp_path / "style.safetensors")
    found = []
    for alpha, rslora in ((2, False), (4, False), (4, True)):
        (tmp_path / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": alpha, "use_rslora": rslora}))
        lora = read_lora(tmp_path / "style.safetensors")
        found.append((lora.sha256, lora.layers[f"base_model.model.{KEY}"].scaling))
    assert len({digest for digest, _ in found}) == 3
    assert [scaling for _, scaling in found] == [1, 2, pytest.approx(4 / 2**0.5)]


def pair(module: str, a: Tensor = A, b: Tensor = B) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown native name": (pair("blocks.9.attn.qkv"), "changes blocks.9.attn.qkv, but no network has"),
    "unknown kohya name": (
        pair("lora_unet_blocks_9_attn_qkv"),
        "changes lora_unet_blocks_9_attn_qkv, but the transformer has no module of this name",
    ),
    "kohya, no such text encoder": (
        pair("lora_te3_encoder_block_0"),
        "changes lora_te3_encoder_block_0, but there is no text_encoder_3",
    ),
    "rows that are no thirds": (pair(KEY, b=torch.ones(97, 2)), f"changes {KEY}, whose 97 output channels"),
    "other rows": (pair(KEY, b=torch.ones(93, 2)), f"{KEY} by a weight of shape (31, 32), but transformer_b"),
    "other width": (
        pair("diffusion_model.blocks.0.attn.qkv", torch.ones(2, 31)),
        f"diffusion_model.{KEY} by a",
    ),
    "twice": (
        {**pair(KEY), **pair("transformer.transformer_blocks.0.attn1.to_k", b=torch.ones(32, 2))},
        "transformer_blocks.0.attn1.to_k.weight of the transformer twice: by ",
    ),
    "half a native pair": ({f"{KEY}.lora_A.weight": A}, f"has no lora_B for {KEY}"),
    "half a kohya pair": (
        {"lora_unet_blocks_0_attn_qkv.lora_up.weight": B},
        "no lora_A for lora_unet_blocks_0",
    ),
    "mixed": ({**PEFT, **pair(KEY)}, "only one of the names begins with base_model.model."),
    "a norm": (
        pair("blocks.0.attn.q_norm", torch.ones(2, 1), torch.ones(32, 2)),
        "blocks.0.attn.q_norm by a",
    ),
    "kohya's DoRA": ({"lora_unet_blocks_0_attn_qkv.dora_scale": B}, "attn_qkv.dora_scale, which is not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused_by_key_at_build_and_in_an_open_bundle(
    name, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    tensors, words = REFUSED[name]
    file = tmp_path / "style.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)
    checkpoint, manifest = open_checkpoint(tiny_checkpoint), load_manifest(tiny_bundle)
    artifacts = {n: stage.artifacts[0] for n, stage in manifest.stages.items()}
    native = find_family(checkpoint).native_names(checkpoint)
    with pytest.raises(UsageError) as at_build:
        read_choices([LoraChoice(file)], checkpoint, native)
    with pytest.raises(UsageError) as when_open:
        Reopener(tiny_bundle, manifest, artifacts, LoadOptions()).resolved(read_lora(file))
    for refused in (at_build, when_open):
        assert words in str(refused.value) and refused.value.hint
