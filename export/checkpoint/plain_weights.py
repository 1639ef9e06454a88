"""The tensors of a checkpoint as a network's plain weights: without a wrapper's names, and in floating point.

Every reader of weights goes through `plain_weights`. It serves what is plain data under another name or scale, and
refuses by name what is not: the weights of a LoRA, and quantized formats that ditc does not read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ditc.export.checkpoint.foreign_weights import check_foreign
from ditc.export.checkpoint.scaled_fp8 import dequantized
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource
from ditc.runtime.errors import CheckpointError

log = logging.getLogger(__name__)

# Parts of a name that torch puts in front of a module that it wraps: torch.compile, FSDP, activation checkpointing.
ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DistributedDataParallel, DataParallel and AveragedModel wrap the whole network, so every name begins with this.
OUTERMOST = "module."
# The number of updates of torch.optim.swa_utils.AveragedModel, beside the weights that it wraps.
COUNTER = "n_averaged"


def plain_weights(place: Path, entries: Mapping[str, TensorEntry]) -> TensorSource:
    """The weights under the network's own names, in floating point; no large tensor is read yet.

    Args:
        place: the file or folder of the tensors, for messages.

    Raises:
        CheckpointError: the tensors are a LoRA's, are quantized in a way that ditc does not read, or have names that
            are equal without the wrappers'.
    """
    own = _unwrapped(place, entries)
    check_foreign(place, own)
    return TensorSource(dequantized(place, own))


def _unwrapped(place: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors without the prefixes of wrappers."""
    names = {name: ".".join(part for part in name.split(".") if part not in ANYWHERE) for name in entries}
    if all(name.startswith(OUTERMOST) or name == COUNTER for name in names.values()):
        names = {full: name.removeprefix(OUTERMOST) for full, name in names.items() if name != COUNTER}
    if [*names] == [*names.values()]:
        return dict(entries)
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        raise CheckpointError(
            f"{place} holds {twice[0]} twice, by itself and under the name of a wrapper",
            hint="two state dicts are mixed: save one of them, without torch.compile's _orig_mod or DDP's module",
        )
    renamed = next(full for full, name in names.items() if full != name)
    log.info("%s: tensors are named as inside a wrapper, such as %s; the prefix is removed", place, renamed)
    return {name: entries[full] for full, name in names.items()}
