"""Convert a native checkpoint to a diffusers directory, and back: the family's row knows how."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ditc.export import families
from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.checkpoint.safetensors_file import safetensors_path
from ditc.export.checkpoint.tensors import TensorSource
from ditc.export.convert.layout import NativeLayout, NativeOptions
from ditc.export.convert.native_file import read_native
from ditc.export.convert.new_directory import check_free
from ditc.export.convert.writer import MAX_SHARD_BYTES
from ditc.runtime.atomic import atomic_folder
from ditc.runtime.errors import CheckpointError, UsageError
from ditc.runtime.files import check_writable

DIFFUSERS_PREFIX = "transformer_blocks."  # of the blocks of every transformer in diffusers that ditc knows
SHOWN = 3


def convert(
    source: Path,
    out: Path,
    *,
    options: NativeOptions,
    base: str | Path | None = None,
    variant: str | None = None,
    ema: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a native checkpoint as a diffusers directory; its tensors' names tell whose it is.

    Args:
        source: a .pth or .safetensors file with native names.
        out: the directory to make; it appears whole or not at all.
        options: what the checkpoint's keys cannot tell.
        base: a diffusers checkpoint whose other parts (text encoder, tokenizer, VAE) are copied; without it
            only what the file holds and the scheduler are written.
        variant: of base's weight files.
        ema: take the averaged weights of a training file.

    Raises:
        UsageError: a missing option, or an output that is there already.
        CheckpointError: a foreign, damaged or misshapen checkpoint, or a value that dtype cannot hold.
    """
    check_free(out)
    native = read_native(source, ema=ema)
    layout = _layout_of(native)
    others = open_checkpoint(base, variant=variant) if base is not None else None
    with atomic_folder(out) as directory:
        layout.write_directory(
            native, directory, options=options, base=others, max_shard_bytes=max_shard_bytes
        )
    return out


def convert_to_native(source: str | Path, out: Path, *, variant: str | None = None) -> Path:
    """Write the networks of a diffusers checkpoint that the family's own files hold, as one such .safetensors file.

    Training-only tensors do not come back: load it into the native network with strict=False.

    Raises:
        UsageError: an output that is there already or has another suffix.
        CheckpointError: a checkpoint of no known family, or of one without files of its own.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is not a .safetensors", hint="name it native.safetensors")
    check_free(out)
    check_writable(out, "OUT")
    checkpoint = open_checkpoint(source, variant=variant)
    family = families.find_family(checkpoint)
    if family.layout is None:
        raise CheckpointError(
            f"{checkpoint.path} is of the family {family.label}, which has no native layout",
            hint=f"families with one: {', '.join(_layouts())}",
        )
    native = family.layout.to_native(checkpoint)
    with safetensors_path(out, hint="choose another OUT") as partial:
        save_file({name: tensor.contiguous() for name, tensor in native.items()}, partial)
    return out


def _layout_of(native: TensorSource) -> NativeLayout:
    """The layout of the family whose names the tensors have. Raises CheckpointError: there is none."""
    if any(name.startswith(DIFFUSERS_PREFIX) for name in native):
        raise CheckpointError(
            "the tensors have diffusers' names already", hint="open the diffusers directory instead"
        )
    layouts = _layouts()
    for layout in layouts.values():
        if layout.recognises(native):
            return layout
    raise CheckpointError(
        f"no family has tensors of these names: the file's begin with {', '.join(list(native)[:SHOWN])}",
        hint=f"native files of these families can be converted: {', '.join(layouts)}",
    )


def _layouts() -> dict[str, NativeLayout]:
    """By the family's label."""
    return {family.label: family.layout for family in families.FAMILIES if family.layout is not None}
