"""Finds and opens the weights of one diffusers or transformers component: one safetensors file, or several shards."""

from __future__ import annotations

import re
from pathlib import Path

from ditc.export.checkpoint.foreign_weights import DEQUANTIZE
from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.plain_weights import plain_weights
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource, read_safetensors
from ditc.runtime.errors import CheckpointError

# Stems of weight file names: SAFETENSORS_WEIGHTS_NAME of diffusers, SAFE_WEIGHTS_NAME of transformers.
STEMS = ("diffusion_pytorch_model", "model")
SHARD = re.compile(r"-\d+-of-\d+\b")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# Formats of other programs, by suffix, with what helps.
OTHER_FORMATS = {
    ".gguf": f"GGUF holds quantized weights: {DEQUANTIZE}",
    ".msgpack": "these are Flax's weights: fetch the safetensors, or save the model from PyTorch",
    ".h5": "these are TensorFlow's weights: fetch the safetensors, or save the model from PyTorch",
    ".onnx": "this is an export of another program: fetch the safetensors that it was made from",
}


def read_weights(directory: Path, variant: str | None) -> tuple[TensorSource, tuple[Path, ...]]:
    """Open every tensor of a component; return them with the files that hold them.

    Args:
        variant: such as "fp16"; None for the default files.

    Raises:
        CheckpointError: the folder has no weights of the variant or more than one save of them, holds pickles, has an
            index that does not fit its shards, or holds a LoRA or weights in a quantized format that ditc does not
            read.
    """
    refuse_pickles(directory)
    saves = [name for name in _save_names(variant) if (directory / name).is_file()]
    if not saves:
        raise _no_weights(directory, variant)
    if len(saves) > 1:
        raise _several_saves(directory, saves)
    path = directory / saves[0]
    if path.suffix == ".json":
        return _read_shards(path)
    return plain_weights(path, read_safetensors(path)), (path,)


def has_variant(directory: Path, variant: str) -> bool:
    """Whether the folder holds a file of the variant: model.fp16.safetensors, or a shard or an index of it."""
    return any(any(directory.glob(pattern)) for pattern in (f"*.{variant}.*", f"*.{variant}-*"))


def refuse_pickles(directory: Path) -> None:
    """Raise CheckpointError if the directory holds a pickle, beside safetensors or instead of them."""
    found = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if not found:
        return
    if any(directory.glob("*.safetensors")):
        hint = "only safetensors are read: delete or move the pickle files"
    else:
        hint = (
            "pickles can run code and are never read: save the model with safe_serialization=True; "
            "`ditc convert` takes a native .pth file"
        )
    raise CheckpointError(f"{directory} holds pickle files: {', '.join(found)}", hint=hint)


def _save_names(variant: str | None) -> list[str]:
    """The files that a save of the variant can begin with: one file with all weights, or the index of shards."""
    if variant is None:
        return [f"{stem}{end}" for stem in STEMS for end in (".safetensors", ".safetensors.index.json")]
    # diffusers puts the variant before the last suffix (_add_variant); older uploads put it after the stem.
    ends = (
        f".{variant}.safetensors",
        f".safetensors.index.{variant}.json",
        f".{variant}.safetensors.index.json",
    )
    return [f"{stem}{end}" for stem in STEMS for end in ends]


def _read_shards(index: Path) -> tuple[TensorSource, tuple[Path, ...]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map from tensor names to file names", hint="fetch the file again"
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {shard!r}, which is not a safetensors file beside it",
                hint="the file is damaged: fetch it again",
            )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, and {len(missing)} of them are missing: {', '.join(missing)}",
            hint="fetch the missing shards",
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        _merge(entries, shard, read_safetensors(index.parent / shard), weight_map, index)
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise CheckpointError(
            f"{index} lists tensors that no shard holds: {_some(absent)}",
            hint="the index and the shards are from different saves: fetch both again",
        )
    return plain_weights(index.parent, entries), tuple(index.parent / shard for shard in shards)


def _merge(
    entries: dict[str, TensorEntry],
    shard: str,
    found: dict[str, TensorEntry],
    weight_map: dict[str, str],
    index: Path,
) -> None:
    foreign = sorted(name for name in found if weight_map.get(name) != shard)
    if foreign:
        raise CheckpointError(
            f"{index.parent / shard} holds tensors that {index.name} does not place there: {_some(foreign)}",
            hint="the index and the shards are from different saves: fetch both again",
        )
    entries.update(found)


def _several_saves(directory: Path, saves: list[str]) -> CheckpointError:
    """diffusers would read the index and transformers the single file, so what is meant cannot be known."""
    return CheckpointError(
        f"{directory} holds {len(saves)} saves of the same weights: {' and '.join(saves)}",
        hint="keep the one that is meant and move the other out of the folder (diffusers reads an index first, "
        "transformers a single file)",
    )


def _no_weights(directory: Path, variant: str | None) -> CheckpointError:
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    wanted = f"variant {variant!r}" if variant else "the default variant"
    if any(SHARD.search(name) for name in found):
        return CheckpointError(
            f"{directory} has shards, but of {wanted} it has neither an index nor a single file: {_some(found)}",
            hint="fetch the index, whose name ends in .safetensors.index.json, or choose another --variant",
        )
    if found:
        return CheckpointError(
            f"{directory} has no weights of {wanted}, only {', '.join(found)}",
            hint="choose a variant that is there with --variant, or fetch the missing weights",
        )
    others = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_FORMATS)
    if others:
        return CheckpointError(
            f"{directory} has no safetensors weights, only {', '.join(others)}",
            hint=OTHER_FORMATS[Path(others[0]).suffix],
        )
    return CheckpointError(f"{directory} has no safetensors weights", hint="fetch the component's weights")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
