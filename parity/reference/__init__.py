"""The second reference: diffusers' pipeline, or the family's module here where diffusers has no pipeline for it.

A family whose row names another package than diffusers has a module here of its folder's name. Its `open_pipeline`
assembles upstream's own modules into a pipeline that is called as diffusers' are.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ditc.export.checkpoint.open import Checkpoint
from ditc.export.families import DIFFUSERS, Family, find_family

OpenPipeline = Callable[[Checkpoint, torch.dtype], Any]


def upstream_name(checkpoint: Checkpoint) -> str:
    """What reports call the second reference."""
    return find_family(checkpoint).upstream


def why_no_upstream(checkpoint: Checkpoint) -> str:
    """Why this checkpoint's second reference cannot be had here; "" if it can."""
    package = upstream_name(checkpoint)
    return "" if find_spec(package) else f"the {package} package is not installed"


def find_pipeline(checkpoint: Checkpoint) -> OpenPipeline | None:
    """What loads the checkpoint's second reference; None where that is diffusers' own pipeline."""
    return pipeline_of(find_family(checkpoint))


def pipeline_of(family: Family) -> OpenPipeline | None:
    """What loads the second reference of a family; None where that is diffusers' own pipeline."""
    if family.upstream == DIFFUSERS:
        return None
    open_pipeline: OpenPipeline = import_module(f"{__name__}.{family.folder}").open_pipeline
    return open_pipeline
