"""What model_index.json says: the pipeline's class, and the library and class of each component.

Its word counts, as in diffusers, which opens each folder with the class that is named here. A folder's own config may
leave its class out, but may not name another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ComponentClass:
    """The class that a component is opened with, such as diffusers.AutoencoderDC."""

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}.{self.name}"


def pipeline_class(path: Path, model_index: Mapping[str, Any]) -> str:
    """The class of the checkpoint's pipeline.

    Args:
        path: the checkpoint's directory, for messages.

    Raises:
        CheckpointError: no class is named, or the class is code that comes with the checkpoint.
    """
    name = model_index.get("_class_name")
    if isinstance(name, list):
        raise CheckpointError(
            f"{path / 'model_index.json'} names a pipeline of its own, _class_name = {name!r}: the code of its class "
            "comes with the checkpoint, and code from a checkpoint is never run",
            hint="save the checkpoint with a pipeline of diffusers that draws the same pictures, if there is one",
        )
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path / 'model_index.json'} does not name the pipeline's class: _class_name is {name!r}",
            hint="fetch model_index.json again, or save the checkpoint again with pipeline.save_pretrained(...)",
        )
    return name


def component_classes(path: Path, model_index: Mapping[str, Any]) -> dict[str, ComponentClass]:
    """Folder name -> class, for every component that is not left out, which is written as [null, null].

    Args:
        path: the checkpoint's directory, for messages.

    Raises:
        CheckpointError: an entry has another form, or its name leads out of the checkpoint.
    """
    classes: dict[str, ComponentClass] = {}
    for name, value in model_index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # _class_name, _diffusers_version, _ignore_files and the pipeline's scalar settings
        if Path(name).name != name:
            raise CheckpointError(
                f"{path / 'model_index.json'} names a component {name!r} outside the checkpoint",
                hint="the file is damaged or from a source that cannot be trusted",
            )
        if value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise CheckpointError(
                f"{path / 'model_index.json'} says {name} = {value!r}, which is neither [library, class] nor "
                "[null, null]",
                hint="fetch model_index.json again, or save the checkpoint again with pipeline.save_pretrained(...)",
            )
        classes[name] = ComponentClass(*value)
    if not classes:
        raise CheckpointError(
            f"{path / 'model_index.json'} names no components", hint="is this a diffusers pipeline?"
        )
    return classes


def config_as_opened(directory: Path, config: Mapping[str, Any], opened_as: ComponentClass) -> dict[str, Any]:
    """A config.json of diffusers as its class reads it, with the class that model_index.json names.

    diffusers ignores the settings that `_use_default_values` lists, because their values are defaults of the version
    that saved the file.

    Raises:
        CheckpointError: the config names another class than model_index.json.
    """
    saved_as = config.get("_class_name", opened_as.name)
    if saved_as != opened_as.name:
        raise CheckpointError(
            f"model_index.json opens {directory} as a {opened_as.name}, but its config.json was saved by {saved_as!r}",
            hint="the files are from different saves: fetch both again, or correct the one that is wrong",
        )
    return without_defaults(config) | {"_class_name": opened_as.name}


def without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that `_use_default_values` lists, and without that list."""
    listed = config.get("_use_default_values")
    dropped = ["_use_default_values", *(listed if isinstance(listed, list) else [])]
    return {name: value for name, value in config.items() if name not in dropped}
