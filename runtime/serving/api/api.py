"""What the routes of the API share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.byte_room import ByteRoom, Need
from ditc.runtime.serving.api.drawing import Beginnings
from ditc.runtime.serving.api.encoding import Encoder
from ditc.runtime.serving.api.idempotency import KEY_HEADER, Idempotency
from ditc.runtime.serving.api.image_jobs import ImageJob
from ditc.runtime.serving.api.jobs import Jobs
from ditc.runtime.serving.api.kept import Kept
from ditc.runtime.serving.api.ongoing import Ongoing, Shared
from ditc.runtime.serving.api.request_limits import DEFAULTS, RequestLimits
from ditc.runtime.serving.api.uploads import Upload, read_upload
from ditc.runtime.serving.api.video_jobs import VideoJob
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.models import Models

log = logging.getLogger(__name__)


class Api:
    """The parts that draw, encode and keep. One for each application, in `app.state.api`."""

    def __init__(self, models: Models, limits: RequestLimits = DEFAULTS) -> None:
        self.models, self.limits = models, limits
        self.encoder = Encoder()
        self._uploads = ByteRoom(limits.max_picture_bytes, "pictures")
        self.idempotency = Idempotency(self._kept())
        kept = self._kept()  # what one key may have is bounded for both kinds of jobs together
        self.jobs, self.videos = Jobs(ImageJob, kept), Jobs(VideoJob, kept)
        self._beginnings = Beginnings(models, limits)

    def close(self) -> bool:
        """End the threads. Returns whether they have ended; it waits for nothing that takes long."""
        self._beginnings.close()
        return self.encoder.close()

    def _kept(self) -> Kept[Any]:
        limits = self.limits
        return Kept(most=limits.max_jobs, most_bytes=limits.max_kept_bytes, seconds=limits.keep_seconds)

    async def begin(self, asked: Asked, caller: Caller, request_id: str) -> Ongoing:
        """Accept a request. Raises Refusal if it cannot be."""
        drawing = await self._beginnings.begin(asked, caller)
        log.info("request %s draws %s", request_id, drawing.job.id)
        try:
            return Ongoing(drawing, self.encoder)
        except BaseException:  # the model may have been closed, or its LoRA be lost, in this moment
            drawing.abandon()
            raise

    async def decoded(self, sent: Mapping[str, bytes | str], held: ExitStack) -> dict[str, Upload]:
        """The pictures that came with a request, by their arguments.

        Args:
            sent: files, or data URLs.
            held: gives back their room, when nothing holds them any more.

        Raises:
            Invalid: as `read_upload`, or a picture is damaged.
            Overloaded: there is no room for all of them.
        """
        most, run = self.limits.max_pixels, self.encoder.run
        read = {
            name: await run(read_upload, data, param=name, most_pixels=most) for name, data in sent.items()
        }
        held.callback(self._uploads.take(Need(sum(one.decoded_bytes for one in read.values()))))
        return {name: await run(one.decoded) for name, one in read.items()}

    def shared(self, http: HttpRequest, asked: Asked, body: BaseModel, files: str = "") -> Shared:
        """The drawing of a request, which an idempotency key may share with earlier ones.

        Args:
            files: what tells the files of a form from others, such as their hash.

        Raises:
            Refusal: the key was used for another request.
        """
        # What is kept must not hold the request with its body.
        caller, request_id = caller_of(http), http.state.request_id
        said = f"{http.url.path}\n{http.headers.get('accept', '')}\n{body.model_dump_json()}\n{files}"
        return self.idempotency.shared(
            owner_of(http),
            http.headers.get(KEY_HEADER),
            hashlib.sha256(said.encode()).hexdigest(),
            lambda: self.begin(asked, caller, request_id),
        )


def api_of(http: HttpRequest) -> Api:
    """The Api of the application that got this request."""
    api: Api = http.app.state.api
    return api


def owner_of(http: HttpRequest) -> str:
    """The name of the key that came with a request; "" on a server without keys."""
    return getattr(http.state, "key_name", "")


def caller_of(http: HttpRequest) -> Caller:
    """Who has sent a request, and what they have used."""
    caller: Caller = http.state.caller
    return caller
