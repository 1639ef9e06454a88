"""Reads PNG, JPEG and WebP files as far as their size, and copies them without what a decoder need not see.

Decoders allocate by the size that a file claims, some of them when they open it, and have parsers for texts, colour
profiles, thumbnails and maker notes, where most of their faults were. So the size is read here, and the copy holds one
picture and nothing else. What follows the end of the picture is left out, which is all that makes a file two at once.

    PNG    chunks of PNG 1.2, section 3 (IHDR first, IEND last); APNG's acTL is refused
    JPEG   markers of ITU T.81, annex B; the orientation is in APP1 (Exif)
    WebP   RIFF chunks of RFC 9649; the animation flag of VP8X is refused
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Each scan of a progressive JPEG goes over all pixels. Encoders write about 10; a small file can hold 100,000.
MOST_SCANS = 100
# Tag of TIFF 6.0 (1 to 8: how the picture is turned), and its type, an unsigned 16-bit number.
_ORIENTATION, _SHORT = 0x0112, 3


class Malformed(Exception):
    """The file is not a picture of this format. Messages are for programmers."""


class Animated(Exception):
    """The file holds several pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StillPicture:
    """One picture in a file of a known format.

    Attributes:
        format: as PIL names it.
        data: the file without anything that is not needed to decode it.
        orientation: how it has to be turned, as Exif counts it; 1 is not at all.
    """

    format: str
    width: int
    height: int
    data: bytes
    orientation: int = 1


def read_picture(data: bytes) -> StillPicture | None:
    """The picture in a file, not decoded. None if it is of no format that is taken.

    Raises:
        Malformed, Animated: see there.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError) as e:
        raise Malformed("it ends too early") from e
    return None


def _png(data: bytes) -> StillPicture:
    kept, exif = [PNG_SIGNATURE], b""
    place, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data) or (kind == b"IHDR") != (place == len(PNG_SIGNATURE)):
            raise Malformed("a chunk is out of its place")
        if kind in (b"acTL", b"fcTL"):
            raise Animated
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[place:end])
        elif kind == b"eXIf":
            exif = data[place + 8 : end - 4]
        place = end
    width, height = struct.unpack_from(">II", data, 16)
    return StillPicture(
        format="PNG", width=width, height=height, data=b"".join(kept), orientation=_orientation(exif)
    )


def _jpeg(data: bytes) -> StillPicture:
    kept, exif, size, scans = [b"\xff\xd8"], b"", (0, 0), 0
    place = 2
    while True:
        while data[place] == 0xFF and data[place + 1] == 0xFF:  # fill bytes
            place += 1
        lead, marker = data[place], data[place + 1]
        if lead != 0xFF:
            raise Malformed("no marker where one must be")
        if marker == 0xD9:  # end of image
            break
        end = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
        if end < place + 4 or end > len(data):
            raise Malformed("a segment is longer than the file")
        body = data[place + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            if size != (0, 0):
                raise Malformed("two frames")
            height, width = struct.unpack_from(">HH", body, 1)
            size = (width, height)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = body[6:]
        if (
            marker == 0xDA
        ):  # start of scan: what follows is coded, up to the next marker that is not a restart
            scans += 1
            end = _end_of_scan(data, end)
        if (
            not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE
        ):  # Adobe's APP14 says how colours are coded
            kept.append(data[place:end])
        place = end
    if size == (0, 0) or not 1 <= scans <= MOST_SCANS:
        raise Malformed("no frame, no scan, or too many of them")
    return StillPicture(
        format="JPEG",
        width=size[0],
        height=size[1],
        data=b"".join([*kept, b"\xff\xd9"]),
        orientation=_orientation(exif),
    )


def _end_of_scan(data: bytes, place: int) -> int:
    while True:
        place = data.find(b"\xff", place)
        if place < 0:
            raise Malformed("a scan without an end")
        if data[place + 1] != 0 and not 0xD0 <= data[place + 1] <= 0xD7:
            return place
        place += 2


def _webp(data: bytes) -> StillPicture:
    size, exif = None, b""
    kept: list[bytes] = []
    seen: set[bytes] = set()
    for kind, body in _riff_chunks(data):
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and body[0] & 0x02):
            raise Animated
        if kind == b"EXIF":
            exif = body.removeprefix(b"Exif\0\0")
        if kind not in (b"VP8X", b"ALPH", b"VP8 ", b"VP8L") or kind in seen:
            continue
        seen.add(kind)
        size = size or _webp_size(kind, body)
        if kind == b"VP8X":
            body = bytes([body[0] & 0x10]) + body[1:]  # of the flags only that it has alpha
        kept.append(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2))
    if size is None or not seen & {b"VP8 ", b"VP8L"}:
        raise Malformed("no picture")
    chunks = b"WEBP" + b"".join(kept)
    return StillPicture(
        format="WEBP",
        width=size[0],
        height=size[1],
        data=b"RIFF" + struct.pack("<I", len(chunks)) + chunks,
        orientation=_orientation(exif),
    )


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    (length,) = struct.unpack_from("<I", data, 4)
    place, last = 12, 8 + length
    if last > len(data):
        raise Malformed("shorter than it says")
    while place + 8 <= last:
        kind, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length
        if end > last:
            raise Malformed("a chunk is longer than the file")
        yield kind, data[place + 8 : end]
        place = end + length % 2


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _orientation(exif: bytes) -> int:
    """The orientation in Exif data, which is a TIFF file. 1 if there is none that can be read."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, entry)
            if (tag, kind, count) == (_ORIENTATION, _SHORT, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
