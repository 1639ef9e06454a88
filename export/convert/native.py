"""Convert a native checkpoint to a diffusers directory and back, by the layout in the family's row."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import save_file

from ditc.export import families
from ditc.export.checkpoint.naming import naming
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

log = logging.getLogger(__name__)

# How the names of the blocks begin in every diffusers transformer that ditc knows.
DIFFUSERS_PREFIX = "transformer_blocks."
SHOWN = 3
FOREIGN = "the file is damaged, or holds another kind of network than its tensors' names suggest"


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
    """Write a native checkpoint as a diffusers directory. Its tensors' names tell which family it belongs to.

    Args:
        source: a .pth or .safetensors file with native names.
        out: the directory to make; it appears complete or not at all.
        options: what the tensors cannot tell.
        base: a diffusers checkpoint (directory or hub id) whose other components (text encoder, tokenizer, VAE) are
            copied. Without it, only the scheduler and what the file holds are written.
        variant: which of base's weight files to copy, such as "fp16".
        ema: take the averaged weights of a training file.
        max_shard_bytes: largest size of a weight file, in bytes.

    Raises:
        UsageError: an option is missing, `out` exists, or it cannot be written.
        CheckpointError: the checkpoint is of no known family, is damaged, has wrong shapes, or has a value that does
            not fit the element type.
    """
    check_free(out)
    check_writable(out, "OUT", needed_bytes=source.stat().st_size if source.is_file() else 0)
    native = read_native(source, ema=ema)
    with naming(source):
        native, layout = _layout_of(native)
    others = open_checkpoint(base, variant=variant) if base is not None else None
    with atomic_folder(out) as directory, naming(source, hint=FOREIGN):
        layout.write_directory(
            native, directory, options=options, base=others, max_shard_bytes=max_shard_bytes
        )
    missing = sorted(name for name in layout.needed if not (out / name).is_dir())
    if missing:
        log.warning(
            "%s has no %s, which a build needs: convert again with --base, which names a diffusers checkpoint that has "
            "them",
            out,
            ", ".join(missing),
        )
    return out


def convert_to_native(source: str | Path, out: Path, *, variant: str | None = None) -> Path:
    """Write a diffusers checkpoint as one .safetensors file in the family's native layout.

    The file holds the networks that the family's own files hold. Tensors that only training uses are lost: load the
    file into the native network with strict=False.

    Raises:
        UsageError: `out` exists or does not end in .safetensors.
        CheckpointError: the checkpoint's family is unknown or has no native layout.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} does not end in .safetensors", hint="name it native.safetensors")
    check_free(out)
    check_writable(out, "OUT")
    checkpoint = open_checkpoint(source, variant=variant)
    family = families.find_family(checkpoint)
    if family.layout is None:
        raise CheckpointError(
            f"{checkpoint.path} is of the family {family.label}, which has no native layout",
            hint=f"these families have one: {', '.join(_layouts())}",
        )
    native = family.layout.to_native(checkpoint)
    check_writable(out, "OUT", needed_bytes=sum(tensor.nbytes for tensor in native.values()))
    with safetensors_path(out, hint="choose another OUT") as partial:
        save_file({name: tensor.contiguous() for name, tensor in native.items()}, partial)
    return out


def _layout_of(native: TensorSource) -> tuple[TensorSource, NativeLayout]:
    """The tensors under a family's names, and the layout of the family.

    Training code wraps the network as it likes, so one outer name that all tensors share is removed if a family
    recognises them without it: model. or base_model. in NVlabs' trainers.

    Raises:
        CheckpointError: no family recognises the tensors.
    """
    layouts = _layouts()
    for tensors in (native, _without_outer_name(native)):
        if any(name.startswith(DIFFUSERS_PREFIX) for name in tensors):
            raise CheckpointError(
                "the tensors have diffusers' names already",
                hint="no conversion is needed: give the diffusers directory that the file belongs to",
            )
        for layout in layouts.values():
            if layout.recognises(tensors):
                return tensors, layout
    raise CheckpointError(
        f"no family has tensors of these names; the file's first are {', '.join(list(native)[:SHOWN])}",
        hint=f"native files of these families can be converted: {', '.join(layouts)}",
    )


def _without_outer_name(native: TensorSource) -> TensorSource:
    outer = {name.partition(".")[0] for name in native}
    if len(outer) != 1 or any("." not in name for name in native):
        return native
    return TensorSource({name.partition(".")[2]: native.entry(name) for name in native})


def _layouts() -> dict[str, NativeLayout]:
    """Native layouts, by the family's label."""
    return {family.label: family.layout for family in families.FAMILIES if family.layout is not None}
