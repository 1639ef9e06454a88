"""All routes of the API: one router a file, added to the application here."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.routing import Match, Route
from starlette.types import Scope

from ditc.runtime.serving import edits, generations, hugging_face, image_job_routes, model_routes
from ditc.runtime.serving.api import Api

MODULES = (generations, edits, image_job_routes, model_routes, hugging_face)


def add_routes(app: FastAPI, api: Api) -> None:
    """Add the routes that list models and draw pictures."""
    app.state.api = api
    for module in MODULES:
        app.include_router(module.router)


def methods_of(scope: Scope) -> list[str]:
    """The methods that a path of the API takes. The framework knows only those of the first route of a path."""
    routes = (route for module in MODULES for route in module.router.routes if isinstance(route, Route))
    found = [route.methods or set() for route in routes if route.matches(scope)[0] is not Match.NONE]
    return sorted(set().union(*found))
