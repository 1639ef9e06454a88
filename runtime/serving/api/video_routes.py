"""/v1/videos: OpenAI's videos API, whose official client works unchanged.

    client.videos.create_and_poll(prompt="a cat walks through snow", seconds="5")

A video is drawn without a connection. What a client has not fetched goes with the server, or after some time.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ditc.runtime.serving.api.answers import VideoAnswer, VideoDetails, VideoRemoved, VideosAnswer
from ditc.runtime.serving.api.api import api_of, owner_of
from ditc.runtime.serving.api.asked import asked_by_video
from ditc.runtime.serving.api.clients import GONE
from ditc.runtime.serving.api.encoding import VIDEO_TYPES
from ditc.runtime.serving.api.job_routes import After, Limit, Order, begun, page_of
from ditc.runtime.serving.api.openapi import ERRORS, VIDEO_CONTENT, KeyHeader, TimeoutHeader
from ditc.runtime.serving.api.video_bodies import REQUEST_BODY, read_video_body, with_first_frame

router = APIRouter(prefix="/v1/videos")


@router.post("", response_model=VideoAnswer, responses=ERRORS, openapi_extra=REQUEST_BODY)
async def create(http: Request, timeout: TimeoutHeader = "", key: KeyHeader = "") -> VideoAnswer | Response:
    """Begin to draw a video, without waiting for it. With the same idempotency key there is only one job."""
    api = api_of(http)
    try:
        sent = await read_video_body(http)
    except ClientDisconnect:
        return Response(status_code=GONE)
    asked = asked_by_video(sent.body, api.limits, timeout)
    api.videos.check_room(owner_of(http))
    with ExitStack() as held:
        asked = await with_first_frame(api, asked, sent, held)
        return (await begun(http, api.videos, asked, sent.body, sent.digest)).answer()


@router.get("", response_model=VideosAnswer, responses=ERRORS)
async def list_videos(
    http: Request, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> VideosAnswer:
    """The videos of this key, by the time of their creation."""
    return VideosAnswer(**page_of(http, api_of(http).videos, after, limit, order))


@router.get("/{id}", response_model=VideoAnswer, responses=ERRORS)
async def retrieve(http: Request, id: str) -> VideoAnswer:
    """How far a video is."""
    return api_of(http).videos.find(owner_of(http), id).answer()


@router.get(
    "/{id}/content",
    response_class=Response,
    responses={**ERRORS, 200: {"description": "The bytes of the video.", "content": VIDEO_CONTENT}},
)
async def content(
    http: Request,
    id: str,
    variant: Annotated[Literal["video"], Query(description="Only the video itself.")] = "video",
) -> Response:
    """The file of a completed video."""
    job = api_of(http).videos.find(owner_of(http), id)
    result = job.result
    if result is None:
        raise job.no_content("video")
    (file,) = result.pictures
    assert file is not None and isinstance(result.details, VideoDetails)  # a lost video has no result
    form = result.details.output_format
    name = f'attachment; filename="{job.id}.{form}"'
    return Response(file, media_type=VIDEO_TYPES[form], headers={"content-disposition": name})


@router.delete("/{id}", response_model=VideoRemoved, responses=ERRORS)
async def remove(http: Request, id: str) -> VideoRemoved:
    """Remove a video. One in work is ended before its next step or latent frame."""
    videos, owner = api_of(http).videos, owner_of(http)
    videos.remove(owner, videos.find(owner, id))
    return VideoRemoved(id=id)
