"""Pictures and videos as bytes, with their settings inside, encoded on threads that neither draw nor answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import BytesIO
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from ditc.runtime.png import write_png
from ditc.runtime.serving.api.asked import Format
from ditc.runtime.video_files import VideoFormat

# Encoding a picture takes a small part of the time of drawing it, and the cores belong to the drawing.
THREADS = 2
# zlib's level. 6 took 1.4 to 2.9 times as long, for files that were 2 to 29 % smaller: a detailed and a smooth picture
# of 1024x1024 pixels, Pillow 13.0, one core of a shared AMD EPYC. Others wait for the cores meanwhile.
PNG_EFFORT = 1

EXIF_IFD, USER_COMMENT, SOFTWARE = 0x8769, 0x9286, 0x0131
# A JPEG segment holds 65,533 bytes. What is longer leaves out the texts, and keeps seed and settings.
MOST_EXIF_BYTES = 60_000
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
VIDEO_TYPES: dict[VideoFormat, str] = {"mp4": "video/mp4", "webp": "image/webp"}
# A video is encoded by one thread, because the cores belong to the drawing.
VIDEO_THREADS = 1

P = ParamSpec("P")
R = TypeVar("R")


class Encoder:
    """A few threads for the work of answers, and one for videos, which take long: nothing else waits for them."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ditc-encode")
        self._videos = ThreadPoolExecutor(1, thread_name_prefix="ditc-encode-video")
        self._in_work: set[Future[Any]] = set()

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do a piece of work on one of the threads."""
        return await self._run(self._pool, lambda: work(*args, **kwargs))

    async def run_video(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Encode a video, after those that came before it."""
        return await self._run(self._videos, lambda: work(*args, **kwargs))

    def close(self) -> bool:
        """Drop what waits. Returns whether nothing is in work any more; it waits for nothing."""
        for pool in (self._pool, self._videos):
            pool.shutdown(wait=False, cancel_futures=True)
        return not any(future.running() for future in list(self._in_work))

    async def _run(self, pool: Executor, work: Callable[[], R]) -> R:
        future = pool.submit(work)
        self._in_work.add(future)
        future.add_done_callback(self._in_work.discard)
        return await asyncio.wrap_future(future)


def encode(picture: Image.Image, form: Format, quality: int, settings: Mapping[str, str]) -> bytes:
    """A picture as the bytes of a file: settings are text chunks of a PNG, and JSON in the EXIF comment of the others.

    Args:
        quality: from 0 to 100, for JPEG and WebP.
    """
    file = BytesIO()
    if form == "png":
        write_png(picture, file, settings, effort=PNG_EFFORT)
    elif form == "jpeg":
        # Quality 0 is the same as 1, but Pillow takes it for its default.
        picture.save(file, format="JPEG", quality=max(quality, 1), exif=_exif(settings))
    else:
        picture.save(file, format="WEBP", quality=quality, exif=_exif(settings))
    return file.getvalue()


def enlarged(preview: Image.Image, width: int, height: int) -> Image.Image:
    """A preview, which has one pixel per latent cell, at the size of its picture."""
    return preview.resize((width, height), Image.Resampling.BICUBIC)


def _exif(settings: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif[SOFTWARE] = settings.get("software", "ditc")
    content = _comment(settings)
    if len(content) > MOST_EXIF_BYTES:
        short = ("seed", "settings", "bundle", "certified", "software")
        content = _comment({name: settings[name] for name in short if name in settings})
    if len(content) <= MOST_EXIF_BYTES:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = content
    return exif


def _comment(settings: Mapping[str, str]) -> bytes:
    """EXIF 2.32, 4.6.5: eight bytes name the character code. ASCII is read by more programs than UNICODE."""
    return b"ASCII\0\0\0" + json.dumps(dict(settings)).encode("ascii")
