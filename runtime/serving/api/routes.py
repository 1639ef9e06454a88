"""All routes of the API: one router a file, added to the application here."""

from __future__ import annotations

from fastapi import FastAPI

from ditc.runtime.serving.api import (
    edits,
    generations,
    hugging_face,
    image_job_routes,
    model_routes,
    video_routes,
)
from ditc.runtime.serving.api.api import Api


def add_routes(app: FastAPI, api: Api) -> None:
    """Add the routes that list models and draw pictures."""
    app.state.api = api
    for module in (generations, edits, image_job_routes, video_routes, model_routes, hugging_face):
        app.include_router(module.router)
