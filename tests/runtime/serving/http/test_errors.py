"""Everything that goes wrong has OpenAI's error body, and says nothing that is not for clients."""

from __future__ import annotations

import logging

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from ditc.runtime.errors import BundleError, NumericsError, OutputError, UsageError
from ditc.runtime.serving.http.errors import answer, body_of, refusal_of
from ditc.runtime.serving.refusals import Invalid, Overloaded, TooLate, Unavailable


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = Field(max_length=5)
    n: int = Field(1, ge=1, le=10)


def invalid(**fields: object) -> RequestValidationError:
    with pytest.raises(ValidationError) as caught:
        Form.model_validate(fields)
    return RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()])


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Invalid("n is 0"), 400, "invalid_request_error", "invalid_value"),
        (UsageError("size 7x7"), 400, "invalid_request_error", "invalid_value"),
        (Overloaded("full", retry_after=1.2), 429, "rate_limit_error", "overloaded"),
        (TooLate("late"), 504, "server_error", "deadline_exceeded"),
        (Unavailable("not yet", retry_after=5), 503, "server_error", "unavailable"),
        (NumericsError("NaN in denoiser at step 3"), 500, "server_error", "generation_failed"),
        (HTTPException(404), 404, "invalid_request_error", "not_found"),
        (HTTPException(405, headers={"Allow": "POST"}), 405, "invalid_request_error", "method_not_allowed"),
        (invalid(n=1), 400, "invalid_request_error", "missing_required_parameter"),
        (invalid(prompt="a", steps=1), 400, "invalid_request_error", "unknown_parameter"),
        (KeyError("secret"), 500, "server_error", "internal_error"),
    ],
)
def test_every_error_has_a_status_a_type_and_a_code(
    error: Exception, status: int, kind: str, code: str
) -> None:
    response = answer(error)
    refusal = refusal_of(error)
    assert response.status_code == status
    if refusal is not None:
        assert body_of(refusal)["error"].items() >= {"type": kind, "code": code}.items()
    assert kind.encode() in response.body and code.encode() in response.body


@pytest.mark.parametrize(
    "error",
    [
        BundleError("/srv/secret/manifest.json: damaged"),
        OutputError("/srv/secret is full"),
        RuntimeError("/srv/secret"),
        HTTPException(400, detail="/srv/secret"),
        invalid(prompt="/srv/secret"),
    ],
)
def test_a_text_that_is_not_for_clients_reaches_neither_them_nor_the_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        response = answer(error, request_id="req_1")
    assert b"secret" not in response.body
    assert "secret" not in caplog.text


def test_the_log_says_where_an_unknown_error_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a red " + "cat"  # not a literal, as the log has lines of source
    try:
        raise ZeroDivisionError(prompt)
    except ZeroDivisionError as e:
        answer(e, request_id="req_17")
    assert "req_17" in caplog.text and "ZeroDivisionError" in caplog.text and "test_errors.py" in caplog.text
    assert "red cat" not in caplog.text


def test_fields_are_named_with_what_is_wrong_about_them() -> None:
    def message(**fields: object) -> tuple[object, object]:
        refusal = refusal_of(invalid(**fields))
        assert refusal is not None
        error = body_of(refusal)["error"]
        return error["param"], error["message"]

    assert message(n=2) == ("prompt", "prompt is required")
    assert message(prompt="a", n=11) == ("n", "n must be at most 10")
    assert message(prompt="a", n="2") == ("n", "n must be an integer")
    assert message(prompt="abcdef") == ("prompt", "prompt must have at most 5 characters")
    assert message(prompt="a", seeds=1) == ("seeds", "seeds is not an argument of this path")
    assert message(promt="a") == ("promt", "promt is not an argument of this path")  # and prompt is missing


def test_a_client_is_told_when_to_come_back_or_that_it_would_be_in_vain() -> None:
    later = answer(Overloaded("full", retry_after=1.25)).headers
    assert (later["retry-after"], later["retry-after-ms"]) == ("2", "1250")
    assert "x-should-retry" not in later
    assert answer(TooLate("late")).headers["x-should-retry"] == "false"
    assert answer(RuntimeError()).headers["x-should-retry"] == "false"
    assert answer(HTTPException(405, headers={"Allow": "POST"})).headers["allow"] == "POST"


def test_a_message_is_one_line_of_bounded_length() -> None:
    refusal = Invalid("a\x1b[2Jb\u202e" + "x" * 5000, hint="h\ni")
    message = body_of(refusal)["error"]["message"]
    assert len(message) <= 1000 and message.isprintable()
