"""Read a diffusers config.json into a frozen dataclass, refusing what the dataclass does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ditc.runtime.errors import CheckpointError

T = TypeVar("T")


def read_config(cls: type[T], values: Mapping[str, Any], *, ignored: Collection[str]) -> T:
    """An instance of the dataclass cls: its defaults, overridden by values. Lists become tuples.

    Args:
        ignored: settings that do not change what inference computes. Names that begin with _ are diffusers' own.

    Raises:
        CheckpointError: a setting that cls does not know.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known and name not in ignored and not name.startswith("_"):
            raise CheckpointError(
                f"unknown setting {name} = {value!r} in the {cls.__name__.removesuffix('Config')} config.json",
                hint="it may change what the network computes; this version does not know it",
            )
    return cls(**{name: _frozen(value) for name, value in values.items() if name in known})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
