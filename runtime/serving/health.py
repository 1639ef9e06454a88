"""What supervisors and load balancers ask: whether the process lives, and whether it can draw."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

router = APIRouter()


@router.get("/livez")
async def livez() -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Whether requests will be drawn now: 200, or 503 with the reasons."""
    problems = request.app.state.models.problems()
    if problems:
        return JSONResponse({"status": "unavailable", "models": problems}, status_code=503)
    return JSONResponse({"status": "ok"})
