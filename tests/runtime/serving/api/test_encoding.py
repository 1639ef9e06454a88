"""Encoded pictures carry their settings in every format."""

from __future__ import annotations

import json
from io import BytesIO
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from ditc.runtime.serving.api.asked import Format
from ditc.runtime.serving.api.encoding import EXIF_IFD, USER_COMMENT, encode, enlarged

SETTINGS = {"prompt": "a café", "seed": "7", "settings": "{}", "bundle": "ab", "software": "ditc"}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))


def opened(file: bytes) -> Image.Image:
    image = Image.open(BytesIO(file))
    image.load()
    return image


@pytest.mark.parametrize("form", get_args(Format))
def test_a_picture_has_its_format_size_and_settings(form: Format, picture: Image.Image) -> None:
    image = opened(encode(picture, form, 100, SETTINGS))
    assert image.format == form.upper()
    assert image.size == (48, 32)
    if form == "png":
        assert image.text == SETTINGS  # type: ignore[attr-defined]
        assert np.array_equal(image, picture)
    else:
        comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
        assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == SETTINGS


def test_texts_that_do_not_fit_into_a_jpeg_are_left_out(picture: Image.Image) -> None:
    image = opened(encode(picture, "jpeg", 100, {**SETTINGS, "prompt": "é" * 20_000}))
    comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == {
        name: text for name, text in SETTINGS.items() if name != "prompt"
    }


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a_lower_quality_makes_a_smaller_file(form: Format, picture: Image.Image) -> None:
    sizes = [len(encode(picture, form, quality, {})) for quality in (0, 50, 100)]
    assert sizes == sorted(sizes)


def test_a_preview_gets_the_size_of_its_picture() -> None:
    assert enlarged(Image.new("RGB", (2, 3)), 64, 96).size == (64, 96)
