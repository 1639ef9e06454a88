"""Read a diffusers config.json into a frozen dataclass, and refuse settings that the dataclass does not have."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ditc.runtime.bundle.jsondata import Mismatch, from_json
from ditc.runtime.errors import CheckpointError

T = TypeVar("T")

SCALARS = (int, float, bool, str)  # a null is not checked, because it has a meaning in some families


def read_config(cls: type[T], values: Mapping[str, Any], *, ignored: Collection[str]) -> T:
    """Make an instance of the dataclass cls from its defaults, overridden by values. Lists become tuples.

    Args:
        ignored: settings that do not change what inference computes. Names that begin with _ are diffusers' own, and
            are ignored too.

    Raises:
        CheckpointError: cls does not have a setting, or a number, text or flag is not of the type that cls states.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    name_of_config = f"the {cls.__name__.removesuffix('Config')} config.json"
    for name, value in values.items():
        if name not in known and name not in ignored and not name.startswith("_"):
            raise CheckpointError(
                f"unknown setting {name} = {value!r} in {name_of_config}",
                hint="this version of ditc does not know the setting, which may change what the network computes",
            )
        if value is not None and kinds.get(name) in SCALARS:
            try:
                from_json(kinds[name], value, name)
            except Mismatch as e:
                raise CheckpointError(
                    f"{e}, in {name_of_config}", hint="the file is damaged or was edited: download it again"
                ) from e
    return cls(**{name: _frozen(value) for name, value in values.items() if name in known})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
