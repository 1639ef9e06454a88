"""What supervisors, load balancers, Prometheus and operators ask, and the one thing that they may change."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ditc.runtime.serving.api.openapi import ERRORS
from ditc.runtime.serving.http.access import Doorkeeper, reload_keys
from ditc.runtime.serving.http.traffic import Traffic
from ditc.runtime.serving.metrics import CONTENT_TYPE, Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal


def health_routes(models: Models, metrics: Metrics, traffic: Traffic, doorkeeper: Doorkeeper) -> APIRouter:
    """The routes over these models."""
    router = APIRouter()

    @router.get("/livez", tags=["health"])
    async def livez() -> dict[str, str]:
        """The process answers. It says nothing about the models."""
        return {"status": "ok"}

    @router.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        """Whether requests are drawn now: 200, or 503 with the models that keep it from being ready, and why."""
        ready = models.ready and not traffic.ending
        states = {state.name: {"state": state.state, "reason": state.reason} for state in models.states()}
        status = "ready" if ready else "shutting_down" if traffic.ending else "not_ready"
        headers = {} if ready else {"retry-after": "1"}
        return JSONResponse({"status": status, "models": states}, 200 if ready else 503, headers)

    @router.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """All metrics, in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    reloading = asyncio.Lock()

    @router.post("/admin/reload", responses=ERRORS, tags=["admin"])
    async def reload() -> dict[str, Any]:
        """Read the keys again, open rebuilt bundles beside the versions in use, and replace those.

        It answers when that is done. A version whose successor cannot be opened stays in use.
        """
        if reloading.locked():
            raise Refusal(
                "a reload is running",
                hint="come back later",
                status=409,
                code="reload_running",
                retry_after=1.0,
            )
        async with reloading:
            keys = await asyncio.to_thread(reload_keys, doorkeeper)
            done = await asyncio.to_thread(models.reload)
        problems = [] if keys else ["the keys cannot be read, and stay as they were"]
        if failed := [name for name, what in done.items() if what == "failed"]:
            names = ", ".join(failed)
            problems.append(f"the new version of {names} cannot be opened, and the old one stays in use")
        if problems:
            raise Refusal("; ".join(problems), hint="the log of the server says why", code="reload_failed")
        return {"keys": "read", "models": done}

    return router
