"""Render the art: emoji of most groups in three styles, as 128 px RGBA pictures with their names."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from demo.errors import DemoError, explained
from demo.train import packages
from ditc.runtime.atomic import atomic_path, write_atomic

SIZE = 128
_MARGIN = 8  # white on every side, so that no shape touches the border
_LEFT_OUT_GROUPS = {None, 1, 2, 9}  # ungrouped, people and hands (skin tones), components, flags
_SYMBOLS_GROUP = 8  # only its geometric shapes are used; the rest are letters and signs
_SHAPES = ("circle", "square")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The labels of one rendered picture: its concept, its style, and the tags of the emoji data."""

    concept: str
    style: str
    tags: list[str]


def build(cache: Path) -> None:
    """Render all pictures into ``cache/art.npy`` and ``cache/art.json``, unless these files exist.

    Raises:
        DemoError: a package or the renderer is missing, or the disk is full.
    """
    if (cache / "art.json").is_file():
        return
    images, pictures = [], []
    for picture, image in tqdm(_render_all(cache), desc="render", unit="picture"):
        pictures.append(picture)
        images.append(image)
    save_array(cache / "art.npy", np.stack(images))
    with explained():
        write_atomic(cache / "art.json", json.dumps([asdict(p) for p in pictures]))


def load(cache: Path) -> tuple[NDArray[np.uint8], list[Picture]]:
    """Load the pictures (N, 128, 128, 4), RGBA with straight alpha, and their labels.

    Raises:
        DemoError: the art has not been rendered.
    """
    try:
        pictures = [Picture(**p) for p in json.loads((cache / "art.json").read_text())]
        return np.load(cache / "art.npy", mmap_mode="r"), pictures
    except FileNotFoundError as e:
        raise DemoError(f"{e.filename} is missing.", "run: python -m demo.train data") from e


def on_background(rgba: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Blend RGBA pictures (..., 4) over one colour. Returns RGB pictures (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + np.array(colour, np.float32) * (1 - alpha)).astype(np.uint8)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array atomically: the file is either whole or absent."""
    with explained(), atomic_path(path) as partial, partial.open("wb") as stream:
        np.save(stream, array)


def _render_all(cache: Path) -> Iterator[tuple[Picture, NDArray[np.uint8]]]:
    base = packages.unpacked(packages.EMOJIBASE, cache) / "package"
    classic = _IconSet(packages.unpacked(packages.NOTO, cache) / "package")
    flat = _IconSet(packages.unpacked(packages.FLUENT_FLAT, cache) / "package")
    assets = packages.unpacked(packages.FLUENT_3D, cache) / "package" / "assets"
    solid = {_code(f.stem): f for f in assets.iterdir()}
    for emoji in json.loads((base / "en" / "data.json").read_text(encoding="utf-8")):
        if emoji.get("group") in _LEFT_OUT_GROUPS:
            continue
        if emoji["group"] == _SYMBOLS_GROUP and emoji["label"].split()[-1] not in _SHAPES:
            continue
        code = _code(emoji["hexcode"])
        sources = {"classic": classic.svg(code), "flat": flat.svg(code), "3d": solid.get(code)}
        for style, source in sources.items():
            if source is not None:
                picture = Picture(concept=emoji["label"], style=style, tags=emoji.get("tags", []))
                yield picture, _render(source)


class _IconSet:
    """An Iconify package, which maps code points to names, and names to SVG bodies."""

    def __init__(self, folder: Path) -> None:
        self._icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self._names = {_code(k): v for k, v in chars.items()}

    def svg(self, code: str) -> str | None:
        name = self._names.get(code)
        alias = self._icons.get("aliases", {}).get(name)
        icon = self._icons["icons"].get(alias["parent"] if alias else name)
        if icon is None:
            return None
        width, height = (icon.get(k, self._icons.get(k, 16)) for k in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'


def _render(source: str | Path) -> NDArray[np.uint8]:
    inner = SIZE - 2 * _MARGIN
    if isinstance(source, Path):
        with Image.open(source) as opened:
            image = opened.convert("RGBA").resize((inner, inner), Image.Resampling.LANCZOS)
    else:
        image = _rasterize(source, inner)
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    canvas.alpha_composite(image, (_MARGIN, _MARGIN))
    return np.asarray(canvas)


def _rasterize(svg: str, size: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as e:
        raise DemoError("resvg_py is missing.", "pip install -r demo/train/requirements.txt") from e
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _code(hexcode: str) -> str:
    """Normalise code points, which sources write differently: no leading zeros, no emoji variation selector."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")
