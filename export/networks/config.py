"""Read a diffusers config.json into a frozen dataclass, refusing what the dataclass does not know."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ditc.runtime.bundle.jsondata import Mismatch, from_json
from ditc.runtime.errors import CheckpointError

T = TypeVar("T")

SCALARS = (int, float, bool, str)  # null is left to the family, some of which give it a meaning


def read_config(cls: type[T], values: Mapping[str, Any], *, ignored: Collection[str]) -> T:
    """An instance of the dataclass cls: its defaults, overridden by values. Lists become tuples.

    Args:
        ignored: settings that do not change what inference computes. Names that begin with _ are diffusers' own.

    Raises:
        CheckpointError: a setting that cls does not know, or a number, text or flag of another type than cls has.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    name_of_config = f"the {cls.__name__.removesuffix('Config')} config.json"
    for name, value in values.items():
        if name not in known and name not in ignored and not name.startswith("_"):
            raise CheckpointError(
                f"unknown setting {name} = {value!r} in {name_of_config}",
                hint="it may change what the network computes; this version does not know it",
            )
        if value is not None and kinds.get(name) in SCALARS:
            try:
                from_json(kinds[name], value, name)
            except Mismatch as e:
                raise CheckpointError(
                    f"{e}, in {name_of_config}", hint="the file is damaged, or was edited: fetch it again"
                ) from e
    return cls(**{name: _frozen(value) for name, value in values.items() if name in known})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
