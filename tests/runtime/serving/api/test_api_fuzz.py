"""Requests that schemathesis makes from our own OpenAPI, right ones and wrong ones: none of them breaks the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_thread import ServerThread, server_thread

from ditc.runtime.serving.api.request_limits import RequestLimits
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
requests = pytest.importorskip("requests")

# Small pictures of few steps, so that what is accepted is drawn soon.
LIMITS = RequestLimits(max_steps=2, max_pixels=64 * 64, max_images=1, max_jobs=20)
FOREIGN = (b"Traceback", b"site-packages", b"pydantic", b'File "', b"/tmp/", b"/home/")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    models = Models({"tiny": tiny_bundle}, admission=Admission(Bounds(requests=8)), warm_up_seconds=0)
    with server_thread(create_app(models, limits=LIMITS)) as server, models.using():
        yield server
    models.close()


def fuzz(server: ServerThread, cases: int) -> dict[int, int]:
    """Send about so many requests, spread over all operations. Returns how many answers had which status."""
    schema = schemathesis.openapi.from_dict(json.loads(server.ask("GET", "/openapi.json").body))
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    examples = max(1, cases // (len(operations) * len(modes)))
    statuses: dict[int, int] = {}
    session = requests.Session()

    def check(case: schemathesis.Case) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop(
                "model", None
            )  # no generated name is that of the one model, so nothing else would be reached
        response = case.call(base_url=f"http://127.0.0.1:{server.port}", session=session, timeout=60)
        status = response.status_code
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500 or status in (503, 504), response.content
        assert not any(text in response.content for text in FOREIGN), response.content
        assert response.headers["x-request-id"]
        if status >= 400:
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}

    for operation in operations:
        for mode in modes:
            settings = hypothesis.settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            try:
                settings(hypothesis.given(operation.as_strategy(generation_mode=mode))(check))()
            except hypothesis.errors.Unsatisfiable:  # an operation without arguments cannot be called wrongly
                assert mode is schemathesis.GenerationMode.NEGATIVE
    return statuses


def test_some_requests_of_our_own_schema_get_an_answer_each(server: ServerThread) -> None:
    statuses = fuzz(server, 90)  # two of each kind for each operation
    assert sum(statuses.values()) > 30 and {200, 400, 404} <= set(statuses)


@pytest.mark.slow
def test_two_thousand_requests_of_our_own_schema_get_an_answer_each(server: ServerThread) -> None:
    statuses = fuzz(server, 4000)
    assert sum(statuses.values()) >= 2000, statuses
