"""Dataclasses to JSON and back: what does not fit is refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest

from ditc.runtime.bundle.jsondata import Mismatch, from_json, to_json
from ditc.runtime.spec import Backend


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    scale: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    colour: Colour
    inner: dict[str, Inner]
    backend: Backend = Backend.TENSORRT
    many: tuple[Inner, ...] = ()
    maybe: Inner | None = None


VALUE = Outer(
    "n", True, Colour.RED, {"a": Inner((1, 2), 0.5)}, Backend("new"), (Inner((3, 4)),), Inner((5, 6))
)


def test_a_value_survives_the_round_trip() -> None:
    data = to_json(VALUE)
    assert from_json(Outer, data) == VALUE
    assert type(data["colour"]) is type(data["backend"]) is str
    assert from_json(Outer, data).backend is VALUE.backend, (
        "equal names are one object, as enumerations have it"
    )


def test_fields_with_defaults_may_be_left_out() -> None:
    data = {"name": "n", "flag": False, "colour": "red", "inner": {}}
    assert from_json(Outer, data) == Outer("n", False, Colour.RED, {})


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    scale = from_json(Inner, {"size": [1, 2], "scale": 3}).scale
    assert scale == 3.0 and isinstance(scale, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, r"^\$\.name: expected str, got 5"),
        ({"flag": 1}, r"^\$\.flag: expected bool"),
        ({"colour": "blue"}, r"^\$\.colour: 'blue' is not one of \['red'\]"),
        ({"backend": "../x"}, r"^\$\.backend: '\.\./x' is not a backend's name"),
        ({"backend": 5}, r"^\$\.backend: expected Backend, got 5"),
        ({"inner": []}, r"^\$\.inner: expected an object"),
        ({"inner": {"a": {"size": [1]}}}, r"^\$\.inner\.a\.size: expected 2 items, got 1"),
        ({"inner": {"a": {"size": [1, True]}}}, r"^\$\.inner\.a\.size\[1\]: expected int, got True"),
        ({"inner": {"a": {"size": [1, 2.0]}}}, r"^\$\.inner\.a\.size\[1\]: expected int, got 2\.0"),
        ({"many": [{"size": "12"}]}, r"^\$\.many\[0\]\.size: expected a list"),
        ({"many": [{"scale": 1.0}]}, r"^\$\.many\[0\]: field 'size' is missing"),
        ({"maybe": {"size": [1, 2], "x": 1}}, r"^\$\.maybe: unknown field 'x'"),
        ({"extra": 1}, r"^\$: unknown field 'extra'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mismatch, match=message):
        from_json(Outer, {**to_json(VALUE), **change})


@pytest.mark.parametrize("data", [None, 1, "text", [], [{}]])
def test_another_kind_of_value_at_the_top_is_refused(data: object) -> None:
    with pytest.raises(Mismatch, match="expected an object"):
        from_json(Outer, data)
