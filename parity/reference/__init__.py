"""Second references of families that diffusers has no pipeline for: upstream's own modules in a plain torch loop."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ditc.export.checkpoint.open import Checkpoint

# model_index.json's _class_name -> the package that holds upstream's modules.
PACKAGES = {"LucidrainsMMDiTPipeline": "mmdit"}


def upstream_name(checkpoint: Checkpoint) -> str:
    """What reports call the second reference."""
    return PACKAGES.get(_class_name(checkpoint), "diffusers")


def why_no_upstream(checkpoint: Checkpoint) -> str:
    """Why this checkpoint's second reference cannot be had here; "" if it can."""
    package = upstream_name(checkpoint)
    return "" if find_spec(package) else f"the {package} package is not installed"


def find_pipeline(checkpoint: Checkpoint) -> Callable[[Checkpoint, torch.dtype], Any] | None:
    """What loads the checkpoint's second reference; None where that is diffusers' own pipeline."""
    if _class_name(checkpoint) not in PACKAGES:
        return None
    from ditc.parity.reference.lucidrains import open_pipeline

    return open_pipeline


def _class_name(checkpoint: Checkpoint) -> str:
    return str(checkpoint.model_index.get("_class_name", ""))
