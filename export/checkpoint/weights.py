"""Finds and opens the weights of one diffusers or transformers component: one safetensors file, or several shards."""

from __future__ import annotations

from pathlib import Path

from ditc.export.checkpoint.foreign_weights import DEQUANTIZE
from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.plain_weights import plain_weights
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource, read_safetensors
from ditc.runtime.errors import CheckpointError

# Stems of weight file names: SAFETENSORS_WEIGHTS_NAME of diffusers, SAFE_WEIGHTS_NAME of transformers.
STEMS = ("diffusion_pytorch_model", "model")
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
        CheckpointError: the folder has no weights of the variant, holds pickles, has an index that does not fit its
            shards, or holds a LoRA or weights in a quantized format that ditc does not read.
    """
    refuse_pickles(directory)
    for stem in STEMS:
        for index in _index_names(stem, variant):
            if (directory / index).is_file():
                return _read_shards(directory / index)
        single = directory / _single_name(stem, variant)
        if single.is_file():
            return plain_weights(single, read_safetensors(single)), (single,)
    raise _no_weights(directory, variant)


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


def _single_name(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index_names(stem: str, variant: str | None) -> tuple[str, ...]:
    if variant is None:
        return (f"{stem}.safetensors.index.json",)
    # diffusers puts the variant before the last suffix (_add_variant); older uploads put it after the stem.
    return (f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json")


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


def _no_weights(directory: Path, variant: str | None) -> CheckpointError:
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    wanted = f"variant {variant!r}" if variant else "the default variant"
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
