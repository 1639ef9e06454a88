"""Edits of a checkpoint directory, one per kind of damage or disagreement that users have brought.

An edit changes the directory in place. It answers False if there is nothing that it could change, because the family
has no such part or an earlier edit removed it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Apply = Callable[[Path], bool]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to a checkpoint.

    Attributes:
        name: what a failed test is called by.
        apply: does it; False if it does not apply.
        harmless: the checkpoint must still build, because what the edit changes has no effect on upstream's picture.
    """

    name: str
    apply: Apply
    harmless: bool = False


def weights_of(checkpoint: Path, component: str) -> Path | None:
    """The single safetensors file of a component, if it has one."""
    files = sorted((checkpoint / component).glob("*.safetensors"))
    return files[0] if files else None


def read_weights(checkpoint: Path, component: str) -> tuple[Path | None, Tensors]:
    """The single safetensors file of a component with its tensors; None if there is none or an edit damaged it."""
    path = weights_of(checkpoint, component)
    try:
        return path, load_file(path) if path else {}
    except Exception:  # whatever safetensors says about a damaged file
        return None, {}


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Apply:
    """Change a JSON file; `change` gets its contents and edits them."""

    def apply(checkpoint: Path) -> bool:
        path = checkpoint / name
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError):
            return False
        before = json.dumps(data)
        change(data)
        path.write_text(json.dumps(data, indent=2))
        return json.dumps(data) != before

    return apply


def change_tensors(component: str, change: Callable[[Tensors], Tensors | None]) -> Apply:
    """Change the tensors of a component; `change` edits them, or returns others."""

    def apply(checkpoint: Path) -> bool:
        path, tensors = read_weights(checkpoint, component)
        if path is None:
            return False
        changed = change(tensors)
        tensors = tensors if changed is None else changed
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return True

    return apply


def remove(name: str) -> Apply:
    """Remove a file or a folder."""

    def apply(checkpoint: Path) -> bool:
        path = checkpoint / name
        if not path.exists():
            return False
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True

    return apply


def remove_weights(component: str) -> Apply:
    """Remove the weights of a component."""
    return lambda checkpoint: (
        bool(path := weights_of(checkpoint, component)) and remove(str(path))(checkpoint)
    )


def rename_weights(component: str, name: str) -> Apply:
    """Give the weights of a component another file name."""

    def apply(checkpoint: Path) -> bool:
        path = weights_of(checkpoint, component)
        return path is not None and path.name != name and bool(path.rename(path.with_name(name)))

    return apply


def add_lora(checkpoint: Path) -> bool:
    """Add a LoRA where diffusers' save_lora_weights puts it. Nobody loads it unless they are told to."""
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file(
        {f"{name}{x}.weight": torch.ones(2, 2) for x in "AB"}, checkpoint / "pytorch_lora_weights.safetensors"
    )
    return True


def overwrite(find: Callable[[Path], Path | None], content: Callable[[bytes], bytes]) -> Apply:
    """Replace the bytes of a file that is there."""

    def apply(checkpoint: Path) -> bool:
        path = find(checkpoint)
        if path is None or not path.is_file():
            return False
        path.write_bytes(content(path.read_bytes()))
        return True

    return apply


def swap(first: str, second: str) -> Apply:
    """Exchange two files or folders."""

    def apply(checkpoint: Path) -> bool:
        a, b = checkpoint / first, checkpoint / second
        if not (a.exists() and b.exists()):
            return False
        a.rename(checkpoint / "swapped")
        b.rename(a)
        (checkpoint / "swapped").rename(b)
        return True

    return apply


def stale_shards(component: str) -> Apply:
    """Add an older save beside the weights: the same tensors with other values, in one shard with an index."""

    def apply(checkpoint: Path) -> bool:
        path, tensors = read_weights(checkpoint, component)
        if path is None or "-of-" in path.name:
            return False
        shard = f"{path.stem}-00001-of-00001.safetensors"
        save_file(
            {name: tensor * 1.5 for name, tensor in tensors.items()}, path.with_name(shard), {"format": "pt"}
        )
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, shard)}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
        return True

    return apply


def second_variant(component: str) -> Apply:
    """Add an fp16 variant with other values. Without `--variant` nobody reads it."""

    def apply(checkpoint: Path) -> bool:
        path, tensors = read_weights(checkpoint, component)
        if path is None:
            return False
        halves = {
            name: (tensor * 1.5).half() for name, tensor in tensors.items() if tensor.is_floating_point()
        }
        save_file(halves, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
        return True

    return apply


def _drop(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def _prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def _retype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def _rename_first(tensors: Tensors) -> Tensors:
    first = min(tensors)
    return {("renamed." + name if name == first else name): tensor for name, tensor in tensors.items()}


def _quantize_first_matrix(tensors: Tensors) -> None:
    """What bitsandbytes writes: int8 weights, with the scales beside them under SCB."""
    name = min(name for name, tensor in tensors.items() if tensor.dim() == 2)
    scale = tensors[name].abs().amax(1)
    tensors[name] = (tensors[name] / scale[:, None] * 127).round().to(torch.int8)
    tensors[name.removesuffix("weight") + "SCB"] = scale


def _add_tensor(tensors: Tensors) -> None:
    tensors["added.lora_A.weight"] = torch.ones(2, 2)


def _poison(tensors: Tensors) -> None:
    name = max(name for name, tensor in tensors.items() if tensor.dim() >= 2)
    tensors[name].view(-1)[0] = torch.nan


def _transpose_a_matrix(tensors: Tensors) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.dim() == 2 and len(set(tensor.shape)) == 2)
    tensors[name] = tensors[name].T


def _scale_a_number(key: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            config[key] = type(value)(value * factor)

    return change


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({key: value})


def _as_text(config: dict[str, Any]) -> None:
    key = next(key for key, value in config.items() if type(value) is int)
    config[key] = str(config[key])


def _as_null(config: dict[str, Any]) -> None:
    key = next(key for key, value in config.items() if type(value) is int)
    config[key] = None


def _other_scheduler(class_name: str) -> str:
    euler, dpm = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
    return dpm if class_name == euler else euler


def _index_scheduler(index: dict[str, Any]) -> None:
    index["scheduler"] = ["diffusers", _other_scheduler(index["scheduler"][1])]


def _config_scheduler(config: dict[str, Any]) -> None:
    config["_class_name"] = _other_scheduler(config.get("_class_name", ""))


PAIRED_PIPELINES = {
    "SanaPipeline": "SanaControlNetPipeline",
    "SanaPAGPipeline": "SanaControlNetPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3PAGPipeline",
    "LucidrainsMMDiTPipeline": "SanaPipeline",
}


def _other_pipeline(index: dict[str, Any]) -> None:
    index["_class_name"] = PAIRED_PIPELINES.get(index.get("_class_name", ""), "FluxPipeline")


def _swap_special_ids(data: dict[str, Any]) -> None:
    data["bos_token"], data["eos_token"] = data.get("eos_token"), data.get("bos_token")


CONFIG, INDEX = "config.json", "model_index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4821\n"

EDITS: tuple[Edit, ...] = (
    # drop
    Edit("no model_index.json", remove(INDEX)),
    Edit("no weights of the transformer", remove_weights("transformer")),
    Edit("no weights of the text encoder", remove_weights("text_encoder")),
    Edit("no config of the transformer", remove("transformer/config.json")),
    Edit("no config of the VAE", remove("vae/config.json")),
    Edit("no scheduler folder", remove("scheduler")),
    Edit("no vocabulary", remove("tokenizer/tokenizer.json")),
    Edit("no vocabulary of the last tokenizer", remove("tokenizer_3/tokenizer.json")),
    Edit("no tokenizer_config.json", remove("tokenizer/tokenizer_config.json")),
    Edit("no tokenizer in the index", change_json(INDEX, lambda index: index.pop("tokenizer", None))),
    Edit("a null VAE in the index", change_json(INDEX, lambda index: index.update(vae=[None, None]))),
    Edit("a tensor of the transformer dropped", change_tensors("transformer", _drop("proj_out.bias"))),
    Edit("a tensor of the VAE dropped", change_tensors("vae", _drop("decoder.conv_out.bias"))),
    Edit(
        "no class in the transformer's config",
        change_json("transformer/config.json", lambda config: config.pop("_class_name", None)),
    ),
    Edit(
        "no class in the VAE's config",
        change_json("vae/config.json", lambda config: config.pop("_class_name", None)),
        harmless=True,
    ),
    Edit(
        "no architecture in the text encoder's config",
        change_json("text_encoder/config.json", lambda config: config.pop("architectures", None)),
        harmless=True,
    ),
    # duplicate
    Edit("two saves of the transformer", stale_shards("transformer")),
    Edit("two saves of the text encoder", stale_shards("text_encoder")),
    Edit("a variant of the transformer beside it", second_variant("transformer"), harmless=True),
    Edit("a LoRA beside the weights", add_lora),
    Edit("a tensor too many", change_tensors("transformer", _add_tensor)),
    Edit(
        "a control network in the index",
        change_json(INDEX, lambda index: index.update(controlnet=["diffusers", "SanaControlNetModel"])),
    ),
    # rename
    Edit("module. before all names", change_tensors("transformer", _prefix("module."))),
    Edit("_orig_mod. before all names", change_tensors("transformer", _prefix("_orig_mod."))),
    Edit("one tensor renamed", change_tensors("text_encoder", _rename_first)),
    Edit(
        "the transformer under the name of transformers' files",
        rename_weights("transformer", "model.safetensors"),
    ),
    Edit("another pipeline in the index", change_json(INDEX, _other_pipeline)),
    # retype
    Edit("the transformer in fp16", change_tensors("transformer", _retype(torch.float16)), harmless=True),
    Edit("the VAE in bf16", change_tensors("vae", _retype(torch.bfloat16)), harmless=True),
    Edit("the transformer in bare fp8", change_tensors("transformer", _retype(torch.float8_e4m3fn))),
    Edit("the text encoder in bitsandbytes' int8", change_tensors("text_encoder", _quantize_first_matrix)),
    Edit("a number as text", change_json("transformer/config.json", _as_text)),
    Edit("a number as null", change_json("vae/config.json", _as_null)),
    Edit(
        "a list of class names",
        change_json("transformer/config.json", lambda config: config.update(_class_name=["A", "B"])),
    ),
    Edit("NaN in the weights of the VAE", change_tensors("vae", _poison)),
    # swap
    Edit("configs of transformer and VAE swapped", swap("transformer/config.json", "vae/config.json")),
    Edit("folders of transformer and text encoder swapped", swap("transformer", "text_encoder")),
    Edit("tokenizers swapped", swap("tokenizer", "tokenizer_3")),
    Edit("CLIPs swapped", swap("text_encoder", "text_encoder_2")),
    Edit("a matrix transposed", change_tensors("transformer", _transpose_a_matrix)),
    # disagree
    Edit("another scheduler in the index", change_json(INDEX, _index_scheduler)),
    Edit(
        "another class in the scheduler's config",
        change_json("scheduler/scheduler_config.json", _config_scheduler),
    ),
    Edit(
        "another tokenizer in the index",
        change_json(INDEX, lambda index: index.update(tokenizer=["transformers", "Qwen2Tokenizer"])),
    ),
    Edit(
        "code of the user's own in the index",
        change_json(INDEX, lambda index: index.update(transformer=["my_code", "MyTransformer"])),
    ),
    Edit(
        "fewer layers in the config than in the weights",
        change_json("transformer/config.json", _scale_a_number("num_layers", 0.5)),
    ),
    Edit(
        "a larger vocabulary in the config than in the weights",
        change_json("text_encoder/config.json", _scale_a_number("vocab_size", 2)),
    ),
    Edit(
        "another scaling factor of the VAE",
        change_json("vae/config.json", _scale_a_number("scaling_factor", 1.5)),
        harmless=True,
    ),
    Edit(
        "bos and eos swapped in the tokenizer's config",
        change_json("tokenizer/tokenizer_config.json", _swap_special_ids),
    ),
    *(
        Edit(
            f"{key} = {value} in the scheduler's config",
            change_json("scheduler/scheduler_config.json", _set(key, value)),
        )
        for key, value in (
            ("use_karras_sigmas", True),
            ("use_dynamic_shifting", True),
            ("solver_order", 3),
            ("num_train_timesteps", 500),
            ("shift", 1.0),
        )
    ),
    *(
        Edit(
            f"{key} = {value} in the config of the {part}",
            change_json(f"{part}/config.json", _set(key, value)),
        )
        for part, key, value in (
            ("text_encoder", "hidden_act", "relu"),
            ("text_encoder", "num_hidden_layers", 1),
            ("text_encoder", "sliding_window", 4),
            ("transformer", "guidance_embeds", True),
            ("transformer", "norm_eps", 1e-2),
            ("transformer", "pos_embed_max_size", 8),
            ("vae", "shift_factor", 0.25),
            ("vae", "encoder_block_types", ["ResBlock", "ResBlock"]),
            ("vae", "latent_channels", 4),
        )
    ),
    # files that are not what they should be
    Edit(
        "a git-lfs pointer in place of the weights",
        overwrite(lambda c: weights_of(c, "vae"), lambda _: LFS_POINTER),
    ),
    Edit(
        "a git-lfs pointer in place of the vocabulary",
        overwrite(lambda c: c / "tokenizer/tokenizer.json", lambda _: LFS_POINTER),
    ),
    Edit(
        "weights cut short",
        overwrite(lambda c: weights_of(c, "transformer"), lambda data: data[: len(data) // 2]),
    ),
    Edit("JSON cut short", overwrite(lambda c: c / "vae/config.json", lambda data: data[: len(data) // 2])),
)
