"""The HTTP application: the layers that every request passes, and the routes behind them. `server.py` runs it.

The layers, outermost first:

    CountTraffic    counts all answers by status
    RequestIds      an id for the request, an answer to every exception
    Access          who sends it, and whether they may; every path but two passes here, known or not
    RefuseAtEnd     refuses new work while the server ends
    Incoming        how many requests there are at one time; their bodies, read within bounds
    (routes)

Pages of other origins are never allowed to read answers: there is no CORS.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from ditc.runtime.errors import DitcError
from ditc.runtime.serving.api.api import Api
from ditc.runtime.serving.api.request_limits import DEFAULTS, RequestLimits
from ditc.runtime.serving.api.routes import add_routes
from ditc.runtime.serving.http.access import Access, Doorkeeper, LocalPrograms
from ditc.runtime.serving.http.errors import answer
from ditc.runtime.serving.http.health import health_routes
from ditc.runtime.serving.http.incoming import Incoming
from ditc.runtime.serving.http.request_ids import RequestIds
from ditc.runtime.serving.http.traffic import CountTraffic, RefuseAtEnd, Traffic
from ditc.runtime.serving.http.transport_limits import DEFAULTS as TRANSPORT
from ditc.runtime.serving.http.transport_limits import TransportLimits
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.version import __version__


def create_app(
    models: Models,
    *,
    limits: RequestLimits = DEFAULTS,
    transport: TransportLimits = TRANSPORT,
    doorkeeper: Doorkeeper | None = None,
    metrics: Metrics | None = None,
    traffic: Traffic | None = None,
) -> FastAPI:
    """The application over these models.

    It is served by `ditc serve`, and by anything else that serves ASGI applications. What a client does to a connection
    is bounded by `transport.py`, which needs uvicorn.

    Args:
        doorkeeper: says who may come in. By default, that is programs on this machine.
        metrics, traffic: those of the server that runs it.
    """
    doorkeeper = LocalPrograms() if doorkeeper is None else doorkeeper
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
            Middleware(Access, doorkeeper=doorkeeper),
            Middleware(RefuseAtEnd, traffic=traffic),
            Middleware(Incoming, limits=transport),
        ],
    )
    app.state.models = models
    app.state.doorkeeper = doorkeeper
    for kind in (DitcError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.include_router(health_routes(models, metrics, traffic, doorkeeper))
    add_routes(app, Api(models, limits))
    return app


def _answer(request: Request, error: Exception) -> Response:
    return answer(error, request_id=request.state.request_id)
