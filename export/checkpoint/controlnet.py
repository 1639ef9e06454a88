"""A ControlNet in a folder of its own, as it is published, joined with the checkpoint that it was trained for.

The joined checkpoint is the one that diffusers makes of both:

    controlnet = ...ControlNetModel.from_pretrained(FOLDER)
    ...ControlNetPipeline.from_pretrained(CHECKPOINT, controlnet=controlnet)

Nothing is written. Whether the ControlNet fits the checkpoint, its family checks as if both were in one folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ditc.export.checkpoint.hub import is_hub_id
from ditc.export.checkpoint.json_files import read_json
from ditc.export.checkpoint.model_index import ComponentClass, pipeline_class
from ditc.export.checkpoint.open import Checkpoint, open_checkpoint, open_component
from ditc.runtime.errors import CheckpointError, UsageError

COMPONENT = "controlnet"
# How diffusers names the pipeline with a ControlNet, and such a network.
PIPELINE, JOINED, NETWORK = "Pipeline", "ControlNetPipeline", "ControlNetModel"


def open_joined(
    source: str | Path, *, variant: str | None = None, controlnet: Path | None = None
) -> Checkpoint:
    """Open a checkpoint, with a ControlNet from another folder if one is given.

    Args:
        source, variant: as of `open_checkpoint`.
        controlnet: the folder that holds a ControlNet's config.json and weights.

    Raises:
        CheckpointError: as `open_checkpoint`; or the folder holds no ControlNet.
        UsageError: the checkpoint has a ControlNet of its own.
    """
    if controlnet is not None:
        _check_folder(controlnet)
    checkpoint = open_checkpoint(source, variant=variant)
    return checkpoint if controlnet is None else _joined(checkpoint, controlnet)


def _joined(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    if COMPONENT in checkpoint.components:
        raise UsageError(
            f"{checkpoint.path} has a ControlNet of its own, and --controlnet {folder} names another one",
            hint="leave --controlnet out, or give the checkpoint without a ControlNet",
        )
    network = str(read_json(folder / "config.json")["_class_name"])
    component = open_component(
        folder, variant=checkpoint.variant, opened_as=ComponentClass("diffusers", network)
    )
    base = pipeline_class(checkpoint.path, checkpoint.model_index)
    index = {
        **checkpoint.model_index,
        "_class_name": base.removesuffix(PIPELINE) + JOINED,
        COMPONENT: ["diffusers", network],
    }
    return replace(
        checkpoint,
        model_index=index,
        components={**checkpoint.components, COMPONENT: replace(component, name=COMPONENT)},
        controlnet=folder,
    )


def _check_folder(folder: Path) -> None:
    """Raise CheckpointError unless the folder's config.json is that of a ControlNet."""
    if not folder.is_dir():
        hint = "give the folder that holds the ControlNet's config.json"
        if is_hub_id(str(folder)):
            hint = f"fetch it first: hf download {folder} --local-dir DIR, and give DIR"
        raise CheckpointError(f"--controlnet {folder} is not a directory", hint=hint)
    if (folder / "model_index.json").is_file():
        inside = folder / COMPONENT
        raise CheckpointError(
            f"--controlnet {folder} holds a whole pipeline, not a ControlNet alone",
            hint=f"give {inside}"
            if inside.is_dir()
            else "give the folder that holds the ControlNet's config.json",
        )
    name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(name, str) or not name.endswith(NETWORK):
        what = "does not say which network it is" if name is None else f"is that of {name!r:.80}"
        raise CheckpointError(
            f"--controlnet {folder} is no ControlNet: its config.json {what}",
            hint="give the folder that a ControlNetModel of diffusers was saved in",
        )
