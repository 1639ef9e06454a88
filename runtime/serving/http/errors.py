"""Answers to everything that goes wrong, with OpenAI's error body, so that official clients raise their own exceptions.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Clients read texts that were written for them: those of refusals and of arguments that a bundle cannot draw. Of every
other error they learn that it happened; the log has the rest, under the id of the request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ditc.runtime.errors import NumericsError, OutputError, UsageError
from ditc.runtime.printable import one_line
from ditc.runtime.serving.log_text import where_raised
from ditc.runtime.serving.refusals import Broken, Invalid, NeedsKey, Refusal

log = logging.getLogger(__name__)

# Clients show the message, and values that they sent may be in it.
LONGEST_MESSAGE = 1000

# Code and message of what the framework itself refuses. Its own texts may change, and quote libraries.
_FRAMEWORK = {
    400: ("invalid_body", "the body of the request cannot be read"),
    404: ("not_found", "there is nothing at this path; /openapi.json lists the paths"),
    405: ("method_not_allowed", "this path does not take this method"),
    413: ("body_too_large", "the body of the request is too large"),
    415: ("unsupported_media_type", "the body of the request has a media type that this path does not take"),
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# What is wrong with a field, by pydantic's name for it. {} takes what pydantic says about the bound.
_FIELDS = {
    "missing": "is required",
    "extra_forbidden": "is not an argument of this path",
    "json_invalid": "the body is not valid JSON",
    "string_type": "must be a text",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "has another form than it must have",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "is too large",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be a JSON object, sent as application/json",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def answer(error: Exception, *, request_id: str = "") -> JSONResponse:
    """The answer to an exception.

    Args:
        error: one that is not meant for clients is logged, with where it was raised.
        request_id: for the log.
    """
    refusal = refusal_of(error)
    if refusal is None:
        log_failure(error, request_id)
        refusal = Refusal("the server has failed", hint="its log says more under the id of this request")
    headers = headers_of(refusal)
    if isinstance(error, HTTPException) and error.status_code == 405:
        headers.update(error.headers or {})  # the methods that are allowed
    return JSONResponse(body_of(refusal), refusal.status, headers)


def log_failure(error: Exception, request_id: str) -> None:
    """Log where an error was raised. Its message may quote a prompt, so only -vv shows it."""
    log.error("request %s failed:\n%s", request_id, where_raised(error))
    log.debug("request %s: %s", request_id, error)


def refusal_of(error: Exception) -> Refusal | None:
    """The error as clients may read it. None if its text is not for them."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UsageError) and not isinstance(error, OutputError):
        return Invalid(str(error), hint=error.hint)
    if isinstance(error, NumericsError):
        return Broken(str(error))
    if isinstance(error, RequestValidationError):
        return _invalid_field(_first(error.errors()))
    if isinstance(error, HTTPException):
        code, message = _FRAMEWORK.get(error.status_code, ("refused", "the request is refused"))
        return Refusal(message, status=error.status_code, code=code)
    return None


def body_of(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's error body, also of the events of a stream."""
    message = f"{refusal}; {refusal.hint}" if refusal.hint else str(refusal)
    kind = "server_error" if refusal.status >= 500 else _TYPES.get(refusal.status, "invalid_request_error")
    return {
        "error": {
            "message": one_line(message)[:LONGEST_MESSAGE],
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def headers_of(refusal: Refusal) -> dict[str, str]:
    """When to come back, or that it would be in vain: by the status alone, official clients repeat what has failed."""
    headers = {}
    if isinstance(refusal, NeedsKey):
        headers["www-authenticate"] = refusal.challenge
    if refusal.retry_after is None:
        headers["x-should-retry"] = "false"
    else:
        headers["retry-after"] = str(math.ceil(refusal.retry_after))
        headers["retry-after-ms"] = str(math.ceil(1000 * refusal.retry_after))
    return headers


def _first(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What to say first. A field that does not exist comes before one that is missing: it is that one, misspelt."""
    return min(found, key=lambda one: one["type"] != "extra_forbidden")


def _invalid_field(found: Mapping[str, Any]) -> Invalid:
    """A field that is wrong. The value is not repeated."""
    text = _FIELDS.get(found["type"], "is not valid")
    try:
        text = text.format_map(found.get("ctx") or {})
    except KeyError:
        text = "is not valid"
    place = [
        str(part) for part in found["loc"][1:]
    ]  # the first says whether it is in body, query, path or header
    if found["type"] == "json_invalid":
        return Invalid(text, code="invalid_json")
    param = one_line(".".join(place))[:80] or None
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    message = f"{param or 'the body of the request'} {text}"
    return Invalid(message, param=param, code=code.get(found["type"], "invalid_value"))
