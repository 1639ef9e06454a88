"""Pictures of clients are decoded as PIL decodes them, or refused with a fixed text."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from ditc.runtime.image_input import on_white
from ditc.runtime.serving.api import upload_formats
from ditc.runtime.serving.api.uploads import PIXEL_BYTES, Upload, read_upload
from ditc.runtime.serving.refusals import Invalid

PIXELS = np.random.default_rng(7).integers(0, 256, (6, 9, 4), np.uint8)
DAMAGED = "the picture is damaged or not complete"


def picture(mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(PIXELS, "RGBA")
    return image.convert(mode) if mode.endswith("A") else image.convert("RGB").convert(mode)


def saved(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def decoded(data: bytes, **settings: int) -> Upload:
    return read_upload(data, **settings).decoded()


def refused(data: bytes, **settings: int) -> str:
    with pytest.raises(Invalid) as caught:
        decoded(data, **settings)
    assert caught.value.status == 400 and caught.value.param == "image"
    return str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_a_png_of_every_mode_is_decoded(mode: str) -> None:
    image = picture(mode)
    found = decoded(saved(image, "PNG"))
    assert np.array_equal(found.image, on_white(image))
    assert (found.alpha is not None) == mode.endswith("A")


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"x", "icc_profile": b"profile"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True, "icc_profile": b"profile"}),
    ],
)
def test_jpeg_and_webp_are_decoded_as_pil_does(format: str, settings: dict[str, object]) -> None:
    data = saved(picture(), format, **settings)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(decoded(data).image, expected.convert("RGB"))


def test_cmyk_and_16_bit_grey_become_rgb() -> None:
    data = saved(picture().convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(decoded(data).image, expected.convert("RGB"))
    grey = np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200
    found = decoded(saved(Image.fromarray(grey), "PNG")).image
    assert np.array_equal(np.asarray(found)[..., 0], grey >> 8)


def test_the_alpha_channel_is_a_mask_of_its_own() -> None:
    for format, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = decoded(saved(picture("RGBA"), format, **settings))
        seen = Image.alpha_composite(Image.new("RGBA", (9, 6), "white"), picture("RGBA"))
        assert np.array_equal(found.image, seen.convert("RGB")) and found.alpha is not None
        assert np.array_equal(found.alpha, PIXELS[..., 3])
    transparent = picture("P")
    transparent.info["transparency"] = transparent.getpixel((0, 0))
    assert decoded(saved(transparent, "PNG")).alpha is not None
    opaque = Image.merge("RGBA", [*picture().split(), Image.new("L", (9, 6), 255)])
    assert decoded(saved(opaque, "PNG")).alpha is None


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_put_upright(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decoded(data).image, ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert refused(data) == "the picture is animated"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    assert refused(saved(picture(), format)) == "the file is not a picture that this server reads"


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"<svg/>", b"%PDF-1.7", b"%!PS", bytes(100)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    refused(data)


def claims(width: int, height: int) -> list[bytes]:
    """Small files of each format that claim to be large."""
    rows = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(bytes(10**6))
    png = upload_formats.PNG_SIGNATURE + rows + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    jpeg = bytearray(saved(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    webp = bytearray(saved(picture(), "WEBP"))
    start = webp.index(b"\x9d\x01\x2a")
    webp[start + 3 : start + 7] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    return [png, bytes(jpeg), bytes(webp)]


@pytest.mark.parametrize("kind", range(3))
def test_bombs_are_refused_before_anything_is_decoded(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    assert "pixels" in refused(claims(16000, 16000)[kind])
    assert refused(claims(0, 7)[kind]) == DAMAGED


def test_the_pixel_bound_is_exact() -> None:
    data = saved(picture(), "PNG")
    decoded(data, most_pixels=54)
    assert refused(data, most_pixels=53).startswith("the picture has 9x6 pixels")


def test_a_jpeg_with_very_many_scans_is_refused() -> None:
    data = saved(picture(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert refused(data[:-2] + 200 * data[scan:-2] + data[-2:]) == DAMAGED


def test_nothing_but_the_picture_reaches_the_decoder() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    for format, settings in (("PNG", {}), ("JPEG", {"comment": b"secret"}), ("WEBP", {"xmp": b"secret"})):
        data = saved(picture(), format, exif=exif, icc_profile=b"secret" * 9, **settings) + b"secret zip"
        still = upload_formats.read_picture(data)
        assert still is not None and b"secret" not in still.data and b"secret" in data
        decoded(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(format: str) -> None:
    data = saved(Image.effect_noise((40, 30), 90), format)
    for length in {*range(0, len(data) - 1, 1 + len(data) // 100), len(data) - 1}:
        assert refused(data[:length]) in (DAMAGED, "the file is not a picture that this server reads")


def mutations() -> dict[str, Callable[[random.Random, bytearray], None]]:
    def flip(rng: random.Random, data: bytearray) -> None:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)

    def head(rng: random.Random, data: bytearray) -> None:
        data[rng.randrange(min(60, len(data)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))

    def number(rng: random.Random, data: bytearray) -> None:
        place = rng.randrange(len(data) - 4)
        data[place : place + 4] = rng.choice(
            (b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4), b"\x80" + bytes(3))
        )

    def cut(rng: random.Random, data: bytearray) -> None:
        start = rng.randrange(len(data))
        del data[start : start + rng.randint(1, 40)]

    def double(rng: random.Random, data: bytearray) -> None:
        start = rng.randrange(len(data))
        data[start:start] = data[start : start + rng.randint(1, 200)]

    return {f.__name__: f for f in (flip, head, number, cut, double)}


@pytest.mark.parametrize("mutation", mutations())
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_is_decoded_or_refused(format: str, mutation: str) -> None:
    rng = random.Random(f"{format} {mutation}")
    exif = Image.Exif()
    exif[0x0112] = 6
    mode = "RGB" if format == "JPEG" else "RGBA"
    whole = [saved(picture(mode), format, exif=exif), saved(picture("L"), format, quality=30)]
    for _ in range(60):
        data = bytearray(rng.choice(whole))
        mutations()[mutation](rng, data)
        try:
            found = decoded(bytes(data), most_pixels=10**6)
        except Invalid:
            continue
        assert found.image.mode == "RGB"
        assert found.alpha is None or (found.alpha.mode, found.alpha.size) == ("L", found.image.size)


def test_the_memory_of_a_picture_is_known_before_it_is_decoded() -> None:
    black = saved(Image.new("RGB", (2048, 2048)), "PNG")
    assert len(black) < 20_000
    assert read_upload(black).decoded_bytes == PIXEL_BYTES * 2048**2
