"""Damage to JSON values and to bytes, drawn from a seeded generator: the same seed always does the same damage."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

Place = tuple[str | int, ...]
KINDS = 12

# What a hostile or unlucky author writes instead of a value. Paths out of the working folder name the canary.
NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, -1, 64, 255, 1000, 2**31, 2**63, -(2**63), 10**9, 10**30),
    *(0.0, -0.0, 0.5, 1e-30, 1e30, 1e300, -1e9, float("nan"), float("inf"), float("-inf")),
)
TEXTS: tuple[str, ...] = (
    *(
        "",
        " ",
        "a",
        "0",
        "1e9",
        "null",
        "x" * 300,
        "x" * 100_000,
        "a\0b",
        "\x1b]0;title\x07",
        "\u202egnp.exe",
    ),
    *("\r\n", "%s%n", "{0.__class__}", "${HOME}", "é" * 130, "😀", "A", "os.system", "__class__", "float64"),
    *("/", ".", "..", "/dev/null", "/dev/zero", "../canary/letter.txt", "../../canary", "~/letter.txt"),
    *("file:///etc/passwd", "hub://someone/something", "-o", "--help", "CON", "a:b", "a\\b", "manifest.json"),
)


def value(chooser: random.Random) -> Any:
    """Anything that JSON can hold."""
    kind = chooser.randrange(10)
    if kind < 4:
        return chooser.choice(NUMBERS)
    if kind < 7:
        return chooser.choice(TEXTS)
    if kind < 8:
        return chooser.choice([None, True, False])
    if kind < 9:
        return [value(chooser) for _ in range(chooser.choice([0, 1, 2, 5]))]
    if chooser.random() < 0.1:
        return deep(chooser.choice([50, 500]))
    return {chooser.choice(TEXTS)[:50]: value(chooser) for _ in range(chooser.choice([0, 1, 2]))}


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    nested: Any = []
    for _ in range(levels):
        nested = [nested]
    return nested


def places(data: Any, chooser: random.Random) -> Place:
    """A random place in the data: one descends from the root, so that long tables do not win by their length."""
    place: Place = ()
    while isinstance(data, (dict, list)) and data and (not place or chooser.random() < 0.85):
        key = chooser.choice(list(data)) if isinstance(data, dict) else chooser.randrange(len(data))
        place, data = (*place, key), data[key]
    return place


def at(data: Any, place: Place) -> Any:
    """What is at the place."""
    for key in place:
        data = data[key]
    return data


def damage(
    data: Any, chooser: random.Random, *, most: int = 3, names: Sequence[str] = TEXTS
) -> tuple[Any, list[Place]]:
    """A copy of the data with one to `most` changes, and their places. It differs from the data.

    Args:
        names: what an added field may be called.
    """
    changed = copy.deepcopy(data)
    done: list[Place] = []
    for _ in range(100):
        for _ in range(chooser.choice([1] * 4 + list(range(1, most + 1)))):
            done += _change(changed, chooser, names)
        if done and as_text(changed) != as_text(data):
            break
    return changed, done


def as_text(data: Any) -> str:
    """A text by which two values can be compared, NaN included."""
    return json.dumps(data, sort_keys=False)


def _change(data: Any, chooser: random.Random, names: Sequence[str]) -> list[Place]:
    place = places(data, chooser)
    if not place:
        return []
    parent, key = at(data, place[:-1]), place[-1]
    old = parent[key]
    kind = chooser.randrange(KINDS)
    if kind < 4:
        parent[key] = value(chooser)
    elif kind < 6:
        parent[key] = _tweaked(old, chooser)
    elif kind == 6:
        del parent[key]
    elif kind == 7 and isinstance(parent, dict):
        parent[chooser.choice(names)[:40]] = value(chooser)
    elif kind == 8 and isinstance(parent, dict):
        parent[str(key) + chooser.choice(["_", "2", " "])] = parent.pop(key)
    elif kind == 9 and isinstance(parent, list):
        parent.insert(int(key), copy.deepcopy(old))
    elif kind == 10 and isinstance(parent, list):
        chooser.shuffle(parent)
    else:
        parent[key] = copy.deepcopy(at(data, places(data, chooser)))
    return [place]


def _tweaked(old: Any, chooser: random.Random) -> Any:
    """Something of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return chooser.choice([-old, old + 1, old - 1, old * 2, old // 2, old * 1000, float(old), str(old)])
    if isinstance(old, float):
        return chooser.choice(
            [-old, old + 1e-3, old * 2, old / 2, old * 1e6, int(old) if abs(old) < 1e9 else 0]
        )
    if isinstance(old, str):
        return chooser.choice([old[:-1], old + "x", old.upper(), old * 2, old[::-1], f"../{old}", f"{old}\n"])
    if isinstance(old, list):
        return chooser.choice([old[:-1], old * 2, old[::-1], [old], dict(enumerate(map(str, old))), old * 50])
    if isinstance(old, dict):
        return chooser.choice([dict(reversed(old.items())), list(old), {"x": old}, {}])
    return 0


def damage_bytes(data: bytes, chooser: random.Random) -> bytes:
    """The bytes with some flipped, cut, repeated, or put in. They differ from the data."""
    changed = data
    while changed == data:
        start = chooser.randrange(len(data) + 1)
        end = min(len(data), start + chooser.choice([1, 2, 8, 100, len(data)]))
        part = data[start:end]
        changed = chooser.choice(
            [
                data[:start],
                data[:start]
                + bytes(byte ^ (1 << chooser.randrange(8)) for byte in part[:4])
                + data[start + len(part[:4]) :],
                data[:start] + data[end:],
                data[:start] + part * 2 + data[end:],
                data[:start] + chooser.randbytes(len(part)) + data[end:],
                data + chooser.choice([b"\0", b"}", b"\n", b"\xff" * 100]),
                data[:start]
                + chooser.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"]", b"NaN", b"\0"])
                + data[start:],
            ]
        )
    return changed


def pick_some(items: Sequence[Any], chooser: random.Random, most: int) -> list[Any]:
    """From one to `most` of the items."""
    return chooser.sample(list(items), chooser.randint(1, min(most, len(items))))
