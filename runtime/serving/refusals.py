"""Why a request is not drawn, in the terms of the API: a status code and the fields of OpenAI's error body.

Texts of these errors are for clients: they hold nothing of paths, libraries or other requests.
"""

from __future__ import annotations

from ditc.runtime.errors import DitcError


class Refusal(DitcError):
    """An answer other than a picture.

    Attributes:
        status: the HTTP status code.
        code: what happened, for programs.
        param: the argument that is wrong, if it is one.
        retry_after: seconds after which the request may succeed; None if it would fail again.
    """

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.param, self.retry_after = param, retry_after
        self.status = self.status if status is None else status
        self.code = self.code if code is None else code


class Invalid(Refusal):
    """The request is wrong."""

    status, code = 400, "invalid_value"


class NeedsKey(Refusal):
    """The client has not shown a key that is known.

    Attributes:
        challenge: how it may be shown, in HTTP's words.
    """

    status, code = 401, "invalid_api_key"
    challenge = "Bearer"


class Overloaded(Refusal):
    """The queue, or a client's share of it, is full."""

    status, code = 429, "overloaded"


class TooLate(Refusal):
    """The request's deadline cannot be met, or has passed."""

    status, code = 504, "deadline_exceeded"


class Unavailable(Refusal):
    """The server or the model is not ready, or is shutting down."""

    status, code = 503, "unavailable"


class Broken(Refusal):
    """The picture could not be drawn: a stage failed, or its result is not a picture."""

    status, code = 500, "generation_failed"
