"""The HTTP application: routes, and answers to everything that goes wrong. `server.py` runs it."""

from __future__ import annotations

from fastapi import FastAPI

from ditc.runtime.serving.models import Models
from ditc.runtime.version import __version__


def create_app(models: Models) -> FastAPI:
    """The application over these models.

    It is served by `ditc serve`, and by anything else that serves ASGI applications.
    """
    app = FastAPI(title="ditc", version=__version__, docs_url=None, redoc_url=None)
    app.state.models = models
    return app
