"""Nothing is answered to those who may not ask, whether or not there is something at the path."""

from __future__ import annotations

import base64
import json
import logging
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from serving_thread import Answer, ServerThread, server_thread
from starlette.routing import Route

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.http.access import KeyHolders, check_binding
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds

ALICE, OPS = "alice-0123456789abcdef", "ops-0123456789abcdef"
KEYS = {"keys": [{"name": "alice", "key": ALICE}, {"name": "ops", "key": OPS, "admin": True}]}


def key_file(folder: Path, data: object = KEYS) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps(data))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    with server_thread(doorkeeper=KeyHolders(key_file(tmp_path_factory.mktemp("keys")))) as server:
        yield server


@pytest.fixture(scope="module")
def local() -> Iterator[ServerThread]:
    with server_thread() as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def all_routes(app: FastAPI) -> Iterator[Route]:
    """The application's routes, and those of the routers in it."""
    for route in app.routes:
        yield from route.original_router.routes if hasattr(route, "original_router") else [route]


def test_every_route_is_denied_without_a_key(guarded: ServerThread) -> None:
    app = create_app(Models({}, admission=Admission(Bounds())))
    asked = {
        (method, re.sub("[{}]", "", route.path))
        for route in all_routes(app)
        for method in route.methods or ()
    }
    assert {("POST", "/v1/images/generations"), ("GET", "/livez"), ("GET", "/openapi.json")} < asked
    for method, path in asked:
        answer = guarded.ask(method, path)
        if path in ("/livez", "/readyz"):
            assert answer.status in (200, 503)
        else:
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("GET", "/metrics"),
        ("POST", "/admin/reload"),
        ("GET", "/openapi.json"),
        ("PUT", "/v1/images/generations"),
        ("GET", "/livez/"),
        ("GET", "//livez"),
        ("GET", "/livez/../metrics"),
        ("GET", "/readyz%2f..%2fmetrics"),
        ("GET", "/LIVEZ"),
        ("GET", "/livez;x"),
        ("GET", "/%00"),
        ("OPTIONS", "*"),
        ("BREW", "/"),
        ("GET", "http://localhost/livez"),
    ],
)
def test_unknown_paths_and_methods_are_denied_too(guarded: ServerThread, method: str, path: str) -> None:
    answer = guarded.ask(method, path)
    assert (answer.status, answer.error["code"]) == (401, "missing_api_key")


def test_with_a_key_unknown_paths_are_404_and_methods_405(guarded: ServerThread) -> None:
    assert guarded.ask("GET", "/nothing", headers=bearer(ALICE)).error["code"] == "not_found"
    answer = guarded.ask("PUT", "/livez", headers=bearer(ALICE))
    assert (answer.status, answer.headers["allow"]) == (405, "GET")
    assert guarded.ask("GET", "/v1/models", headers=bearer(ALICE)).status == 200
    assert guarded.ask("GET", "/v1/models", headers={"authorization": f"bEARER   {OPS} "}).status == 200


def test_administration_needs_a_key_that_may(guarded: ServerThread, local: ServerThread) -> None:
    for path in ("/admin", "/admin/reload", "/admin/x", "/%61dmin/reload"):
        assert guarded.ask("POST", path, headers=bearer(ALICE)).error["code"] == "not_an_administrator"
        assert guarded.ask("POST", path, headers=bearer(OPS)).status != 403
        assert local.ask("POST", path).status == 403


def forged(count: int) -> Iterator[str]:
    """Authorization headers that hold no key."""
    yield from ("", "Bearer", "Bearer ", "Basic " + ALICE, ALICE, f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}")
    yield from (f"Bearer {ALICE} {OPS}", f"Bearer, {ALICE}", f"Bearer {ALICE},{OPS}", f"Bearer\t{ALICE}")
    yield from (f'Bearer "{ALICE}"', f"Bearer {ALICE.upper()}", "Bearer " + "a" * 5000, f"Bearer {ALICE}\xff")
    rng = random.Random(5)
    for _ in range(count):
        sent = list(f"Bearer {rng.choice((ALICE, OPS))}")
        for _ in range(rng.randint(1, 4)):
            sent[rng.randrange(7, len(sent))] = chr(rng.choice((*range(33, 127), *range(160, 256))))
        yield "".join(sent)


def test_forged_headers_open_nothing(guarded: ServerThread) -> None:
    for sent in forged(200):
        answer = guarded.ask("GET", "/v1/models", headers={"Authorization": sent})
        assert answer.status == 401 or sent[7:] in (ALICE, OPS)
        assert ALICE.encode() not in answer.body
    two = (
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nAuthorization: Bearer {ALICE}\r\n\r\n"
    )
    answer = guarded.raw(two.encode())
    assert answer is not None and answer.status == 401


def test_an_administrator_reloads_keys_and_learns_nothing_about_the_file(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    with server_thread(doorkeeper=KeyHolders(path)) as server:
        assert json.loads(server.ask("POST", "/admin/reload", headers=bearer(OPS)).body)["keys"] == "read"
        path.write_text("broken")
        answer = server.ask("POST", "/admin/reload", headers=bearer(OPS))
        assert (answer.status, answer.error["code"]) == (500, "reload_failed")
        assert answer.error["message"].startswith("the keys cannot be read, and stay as they were; ")
        assert str(path) not in answer.body.decode()
        assert server.ask("GET", "/v1/models", headers=bearer(OPS)).status == 200


def test_the_work_of_a_key_is_counted_when_it_draws(tiny_bundle: Path, tmp_path: Path) -> None:
    entry = {"name": "alice", "key": ALICE, "pixel_steps_per_minute": 64 * 64 * 3, "concurrent_requests": 1}
    models = Models({"tiny": tiny_bundle}, admission=Admission(Bounds()), warm_up_seconds=0)
    holders = KeyHolders(key_file(tmp_path, {"keys": [entry]}))
    sent = {"Content-Type": "application/json", **bearer(ALICE)}

    def draw(steps: int) -> Answer:
        body = {"prompt": "a cat", "size": "64x64", "num_inference_steps": steps}
        return server.ask("POST", "/v1/images/generations", json.dumps(body).encode(), sent)

    with server_thread(models=models, doorkeeper=holders) as server:
        assert draw(2).status == 200
        refused = draw(2)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert (
            15 < int(refused.headers["retry-after"]) <= 20
        )  # a third of a minute's work, and some has come back
        assert draw(4).error["code"] == "too_much_work"
        assert draw(1).status == 200
    models.close()


def test_the_official_client_raises_its_exceptions_and_repeats_nothing_in_vain(
    guarded: ServerThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    openai = pytest.importorskip("openai")

    def error_of(server: ServerThread, key: str, retries: int = 3, **fields: object) -> Exception:
        """The error that the client raises after it has asked once."""
        url = f"http://127.0.0.1:{server.port}/v1"
        asked = {"prompt": "a cat", "model": "none", **fields}
        with (
            openai.OpenAI(base_url=url, api_key=key, max_retries=retries) as client,
            caplog.at_level(logging.INFO),
        ):
            caplog.clear()
            with pytest.raises(openai.APIStatusError) as caught:
                client.images.generate(**asked)
            end = time.monotonic() + 30  # the server logs an answer after the client has read it
            while "POST /v1/images/generations " not in caplog.text and time.monotonic() < end:
                time.sleep(0.01)
        assert caplog.text.count("POST /v1/images/generations ") == 1
        assert caught.value.request_id and caught.value.body["code"] == caught.value.code
        return caught.value

    for key, fields, kind in (
        ("wrong-0123456789abcdef", {}, openai.AuthenticationError),
        (ALICE, {}, openai.NotFoundError),
        (ALICE, {"n": 0}, openai.BadRequestError),
        (ALICE, {"prompt": "a" * 2**20}, openai.APIStatusError),
    ):
        assert isinstance(error_of(guarded, key, **fields), kind)
    entry = {"name": "alice", "key": ALICE, "requests_per_minute": 1}
    with server_thread(doorkeeper=KeyHolders(key_file(tmp_path, {"keys": [entry]}))) as server:
        server.ask("GET", "/v1/models", headers=bearer(ALICE))
        error = error_of(server, ALICE, retries=0)
        assert isinstance(error, openai.RateLimitError)
        assert 0 < int(error.response.headers["retry-after"]) <= 60


def test_a_reload_takes_new_keys_or_keeps_the_old_ones(tmp_path: Path) -> None:
    path = key_file(tmp_path, {"keys": [{"name": "alice", "key": ALICE, "requests_per_minute": 9}]})
    holders = KeyHolders(path)
    alice = holders.caller([(b"authorization", f"Bearer {ALICE}".encode())])
    path.write_text("broken")
    with pytest.raises(UsageError):
        holders.reload()
    assert holders.caller([(b"authorization", f"Bearer {ALICE}".encode())]) is alice
    entries = [
        {"name": "alice", "key": OPS, "requests_per_minute": 9},
        {"name": "bob", "key": "bob-0123456789abcdef"},
    ]
    path.write_text(json.dumps({"keys": entries}))
    holders.reload()
    assert (
        holders.caller([(b"authorization", f"Bearer {OPS}".encode())]) is alice
    )  # what she has used still counts
    with pytest.raises(Exception, match="the key is wrong"):
        holders.caller([(b"authorization", f"Bearer {ALICE}".encode())])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "LOCALHOST:9", "[::1]:8000", "127.0.0.1"])
def test_without_keys_the_names_of_this_machine_are_answered(local: ServerThread, host: str) -> None:
    assert local.ask("GET", "/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "10.0.0.1", "[::2]", "::"],
)
def test_without_keys_other_names_are_refused(local: ServerThread, host: str) -> None:
    answer = local.ask("GET", "/v1/models", headers={"Host": host})
    assert (answer.status, answer.error["code"]) == (403, "wrong_host")


def test_without_keys_pages_of_other_origins_are_refused(local: ServerThread) -> None:
    def status(method: str = "POST", **headers: str) -> int:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return local.ask(method, "/v1/models", headers={"Host": "localhost:1", **sent}).status

    assert status(Origin="http://localhost:1") == 405
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:2",
        "http://localhost:1.evil.example",
        "",
    ):
        assert status(Origin=origin) == 403
    assert status("GET", Sec_Fetch_Site="same-origin") == 200
    assert status("GET", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403
    assert status("GET", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 200
    answer = local.ask("OPTIONS", "/v1/models", headers={"Origin": "http://localhost"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_browsers_ask_their_users_for_a_key_where_there_is_a_page(
    guarded: ServerThread, tmp_path: Path
) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(f"anybody:{ALICE}".encode()).decode()}
    assert guarded.ask("GET", "/v1/models", headers=basic).status == 401
    with server_thread(doorkeeper=KeyHolders(key_file(tmp_path), browsers=True)) as server:
        assert server.ask("GET", "/").headers["www-authenticate"].startswith("Basic ")
        assert server.ask("GET", "/v1/models", headers=basic).status == 200
        assert server.ask("GET", "/v1/models", headers=bearer(ALICE)).status == 200
        for foreign in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert server.ask("POST", "/v1/models", headers={**basic, **foreign}).status == 403
        for broken in (
            "Basic",
            "Basic =",
            "Basic " + ALICE,
            "Basic " + base64.b64encode(ALICE.encode()).decode(),
        ):
            assert server.ask("GET", "/v1/models", headers={"Authorization": broken}).status == 401


def test_only_loopback_is_bound_without_keys() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_binding(host, None)
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "example.org", "::ffff:10.0.0.1"):
        with pytest.raises(UsageError, match="without keys"):
            check_binding(host, None)
        check_binding(host, Path("keys.json"))


def test_the_log_has_names_of_keys_and_neither_keys_nor_prompts(
    guarded: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        body = json.dumps({"prompt": "a red cat", "model": "a red cat"}).encode()
        sent = {"Content-Type": "application/json", "x-request-id": "mine-1", **bearer(ALICE)}
        answer = guarded.ask("POST", "/v1/images/generations?prompt=a+red+cat", body, sent)
        guarded.ask("GET", "/", headers=bearer(OPS[:-1] + "x"))
    assert answer.status == 404 and answer.headers["x-request-id"] == "mine-1"
    assert "POST /v1/images/generations 404 key=alice id=mine-1" in caplog.text
    assert "red" not in caplog.text and "0123456789" not in caplog.text


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\x1b[2J", "ü", "../../etc"])
def test_ids_of_requests_are_plain(local: ServerThread, sent: str) -> None:
    answer = local.ask("GET", "/v1/models", headers={"x-request-id": sent})
    assert answer.headers["x-request-id"].startswith("req_") or answer.status == 400
