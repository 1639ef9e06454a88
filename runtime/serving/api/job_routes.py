"""What the routes of asynchronous jobs have in common, whatever the jobs draw."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from ditc.runtime.serving.api.api import api_of, owner_of
from ditc.runtime.serving.api.asked import Asked
from ditc.runtime.serving.api.jobs import J, Jobs

After = Annotated[str | None, Query(max_length=100, description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


async def begun(http: Request, jobs: Jobs[J], asked: Asked, body: BaseModel, files: str = "") -> J:
    """The job of a request, which goes on without it. With the same idempotency key there is only one job.

    If that job was deleted or has expired, and its result is still kept for the key, it is known again.

    Args:
        files: as in `Api.shared`.

    Raises:
        Refusal: the request is not accepted.
    """
    owner = owner_of(http)
    # Nobody leaves: a job is drawn to its end, or to its DELETE.
    ongoing, _ = await api_of(http).shared(http, asked, body, files).join()
    return jobs.known(owner, jobs.id_of(ongoing)) or jobs.add(owner, ongoing)


def page_of(http: Request, jobs: Jobs[J], after: str | None, limit: int, order: Order) -> dict[str, Any]:
    """The fields of a page of the jobs of a request's key, by the time of their creation.

    Raises:
        Invalid: no job has the id `after`.
    """
    found, more = jobs.page(owner_of(http), after=after, limit=limit, newest_first=order == "desc")
    ids = [job.id for job in found]
    return {
        "data": [job.answer() for job in found],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": more,
    }
