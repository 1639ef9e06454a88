"""Read a diffusers config.json into a frozen dataclass, and refuse settings that the dataclass does not have."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ditc.runtime.bundle.jsondata import Mismatch, from_json
from ditc.runtime.errors import CheckpointError

T = TypeVar("T")

# Of any count or size in a config. The largest in published models are vocabularies, with 2**18 rows.
LARGEST = 2**20
# Of an autoencoder. Each stage halves the sides; published models have at most 7.
MAX_STAGES = 10


def read_config(
    cls: type[T], values: Mapping[str, Any], *, ignored: Collection[str], may_be_zero: Collection[str] = ()
) -> T:
    """Make an instance of the dataclass cls from its defaults, overridden by values. Lists become tuples.

    Args:
        ignored: settings that do not change what inference computes. Names that begin with _ are diffusers' own, and
            are ignored too.
        may_be_zero: integers that can be 0. All others count or size something, and are at least 1.

    Raises:
        CheckpointError: cls does not have a setting, or a value is not of the type that cls states, not finite, or not
            a size.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    file = f"the {cls.__name__.removesuffix('Config')} config.json"
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            read[name] = _read(kinds[name], value, name, file, least=0 if name in may_be_zero else 1)
        elif name not in ignored and not name.startswith("_"):
            raise CheckpointError(
                f"unknown setting {name} = {value!r} in {file}",
                hint="this version of ditc does not know the setting, which may change what the network computes",
            )
    return cls(**read)


def _read(kind: Any, value: Any, name: str, file: str, *, least: int) -> Any:
    try:
        result = from_json(kind, _as_lists(value), name)
        _check_numbers(result, name, least)
    except Mismatch as e:
        raise CheckpointError(
            f"{e}, in {file}", hint="the file is damaged or was edited: download it again"
        ) from e
    return result


def _check_numbers(value: Any, name: str, least: int) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_numbers(item, f"{name}[{index}]", least)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Mismatch(f"{name}: expected a finite number, got {value!r}")
    elif type(value) is int and value < least:
        raise Mismatch(f"{name}: expected an integer >= {least}, got {value!r}")
    elif type(value) is int and value > LARGEST:
        raise Mismatch(f"{name}: expected an integer <= {LARGEST}, got {value!r:.80}")


def _as_lists(value: Any) -> Any:
    """As JSON has it: the config of a diffusers module holds tuples."""
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value
