"""The references. The second one is unmodified upstream: diffusers for most families, another package for the others.

A family whose row in export/families does not name diffusers has a module in this folder, under the name of the
family's folder. Its `open_pipeline` assembles upstream's own modules into a pipeline that is called in the same way as
those of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.families import DIFFUSERS, Family, find_family

OpenPipeline = Callable[[Checkpoint, torch.dtype], Any]


def upstream_name(checkpoint: Checkpoint) -> str:
    """The package that the second reference comes from. Reports call the reference by this name."""
    return find_family(checkpoint).upstream


def why_no_upstream(checkpoint: Checkpoint) -> str:
    """Why there is no second reference for this checkpoint on this machine; "" if there is one."""
    package = upstream_name(checkpoint)
    if not find_spec(package):
        return f"the {package} package is not installed"
    if checkpoint.loras and package != DIFFUSERS:
        return f"{package} has no LoRAs"
    return _why_no_loras(checkpoint)


def _why_no_loras(checkpoint: Checkpoint) -> str:
    """Why diffusers cannot fuse the checkpoint's LoRAs here; "" if it can, or there are none."""
    if not checkpoint.loras:
        return ""
    if not find_spec("peft"):
        return "the peft package is not installed, without which diffusers reads no LoRA"
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    others = {name for lora in checkpoint.loras for name in lora.components} - {"transformer"}
    if others and Version(version("peft")) < Version(MIN_PEFT_VERSION):
        return (
            f"a LoRA changes the {' and the '.join(sorted(others))}, which transformers does with peft "
            f"{MIN_PEFT_VERSION} or later, and peft is {version('peft')}"
        )
    return ""


def find_pipeline(checkpoint: Checkpoint) -> OpenPipeline | None:
    """The function that opens the checkpoint's second reference; None if that is diffusers' own pipeline."""
    return pipeline_of(find_family(checkpoint))


def pipeline_of(family: Family) -> OpenPipeline | None:
    """The function that opens the second reference of a family; None if that is diffusers' own pipeline."""
    if family.upstream == DIFFUSERS:
        return None
    open_pipeline: OpenPipeline = import_module(f"{__name__}.{family.folder}").open_pipeline
    return open_pipeline
