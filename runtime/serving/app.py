"""The HTTP application: the layers that every request passes, and the routes behind them. `server.py` runs it.

CountTraffic    counts all answers by status
RequestIds      an id for the request, an answer to every exception
RefuseAtEnd     refuses new work while the server ends
(routes)
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.api import Api
from ditc.runtime.serving.errors import answer
from ditc.runtime.serving.health import health_routes
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.request_ids import RequestIds
from ditc.runtime.serving.request_limits import DEFAULTS, RequestLimits
from ditc.runtime.serving.routes import add_routes
from ditc.runtime.serving.traffic import CountTraffic, RefuseAtEnd, Traffic
from ditc.runtime.version import __version__


def create_app(
    models: Models,
    *,
    limits: RequestLimits = DEFAULTS,
    metrics: Metrics | None = None,
    traffic: Traffic | None = None,
) -> FastAPI:
    """The application over these models.

    It is served by `ditc serve`, and by anything else that serves ASGI applications.

    Args:
        metrics, traffic: those of the server that runs it.
    """
    metrics, traffic = metrics or Metrics(), traffic or Traffic()
    app = FastAPI(
        title="ditc",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client sent
        middleware=[
            Middleware(CountTraffic, traffic=traffic, metrics=metrics),
            Middleware(RequestIds),
            Middleware(RefuseAtEnd, traffic=traffic),
        ],
    )
    app.state.models = models
    for kind in (DitcError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.include_router(health_routes(models, metrics, traffic))
    add_routes(app, Api(models, limits))
    return app


def _answer(request: Request, error: Exception) -> Response:
    return answer(error, request_id=request.state.request_id)
