"""/v1/images/jobs: asynchronous jobs for pictures, over HTTP.

OpenAI has such jobs only for videos, under /v1/videos (video_routes.py). The bodies and the life of a job are the same,
with `image` for `video`; but a job that is cancelled stays known, as cancelled. The official client reaches them with
its generic methods: client.post("/images/jobs", cast_to=...).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ditc.runtime.serving.api.answers import JobAnswer, JobRemoved, JobsAnswer
from ditc.runtime.serving.api.api import api_of, owner_of
from ditc.runtime.serving.api.asked import asked_by_openai
from ditc.runtime.serving.api.encoding import MEDIA_TYPES
from ditc.runtime.serving.api.job_routes import After, Limit, Order, begun, page_of
from ditc.runtime.serving.api.openapi import CONTENT, ERRORS, KeyHeader, TimeoutHeader
from ditc.runtime.serving.api.pictures import with_pictures
from ditc.runtime.serving.api.schemas import JobBody
from ditc.runtime.serving.refusals import Invalid

router = APIRouter(prefix="/v1/images/jobs")


@router.post("", response_model=JobAnswer, responses=ERRORS)
async def create(http: Request, body: JobBody, timeout: TimeoutHeader = "", key: KeyHeader = "") -> JobAnswer:
    """Begin to draw, without waiting for the pictures. With the same idempotency key there is only one job."""
    api = api_of(http)
    asked = asked_by_openai(body, api.limits, timeout)
    api.jobs.check_room(owner_of(http))
    with ExitStack() as held:
        asked = await with_pictures(api, asked, body, held)
        return (await begun(http, api.jobs, asked, body)).answer()


@router.get("", response_model=JobsAnswer, responses=ERRORS)
async def list_jobs(
    http: Request, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> JobsAnswer:
    """The jobs of this key, by the time of their creation."""
    return JobsAnswer(**page_of(http, api_of(http).jobs, after, limit, order))


@router.get("/{id}", response_model=JobAnswer, responses=ERRORS)
async def retrieve(http: Request, id: str) -> JobAnswer:
    """How far a job is."""
    return api_of(http).jobs.find(owner_of(http), id).answer()


@router.get(
    "/{id}/content",
    response_class=Response,
    responses={**ERRORS, 200: {"description": "The bytes of a picture.", "content": CONTENT}},
)
async def content(
    http: Request,
    id: str,
    index: Annotated[int, Query(ge=0, le=9, description="Which of the job's pictures.")] = 0,
) -> Response:
    """One picture of a completed job."""
    job = api_of(http).jobs.find(owner_of(http), id)
    result = job.result
    if result is None:
        raise job.no_content("pictures")
    picture = result.pictures[index] if index < len(result.pictures) else None
    if picture is None:
        raise Invalid(
            f"the job has no picture {index}",
            hint=f"it has {len(result.pictures)} pictures, and those in ditc.failures have failed",
            param="index",
            status=404,
            code="no_content",
        )
    return Response(picture, media_type=MEDIA_TYPES[result.asked.format])


@router.delete("/{id}", response_model=JobRemoved, responses=ERRORS)
async def remove(http: Request, id: str) -> JobRemoved:
    """Cancel a job in work, or remove an ended one with its pictures."""
    jobs, owner = api_of(http).jobs, owner_of(http)
    job = jobs.find(owner, id)
    status, ended = job.status, job.outcome is not None
    if ended:
        jobs.remove(owner, job)
    else:
        jobs.cancel(job)
    return JobRemoved(
        id=id,
        deleted=ended,
        status=status if status in ("completed", "failed") else "cancelled",
    )
