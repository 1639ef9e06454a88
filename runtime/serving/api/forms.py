"""Forms that clients send: texts, and the files that a path takes, read within bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ditc.runtime.serving.refusals import Invalid

MULTIPART = "multipart/form-data"
MOST_FIELD_BYTES = 2**20

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Form:
    """What a form holds.

    Attributes:
        fields: texts by their names; of several with one name, the last.
        files: the bytes of files by their names.
    """

    fields: dict[str, str]
    files: dict[str, bytes]

    @property
    def digest(self) -> str:
        """The hash of the files; "" without files."""
        if not self.files:
            return ""
        digest = hashlib.sha256()
        for name, content in self.files.items():
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()


async def read_form(
    http: Request, *, files: Sequence[str], most_fields: int, most_field_bytes: int = MOST_FIELD_BYTES
) -> Form:
    """Read the form of a request.

    Args:
        files: the names that files may have. The official client's form of a list, with [] at the end, is taken too.
        most_field_bytes: of one text.

    Raises:
        Invalid: the form cannot be read or has too many parts, or a file has another name, or one that there was.
        ClientDisconnect: the client has gone away.
    """
    unreadable = Invalid(
        "the form cannot be read",
        hint=f"send {MULTIPART} with at most {len(files)} file{'s' * (len(files) > 1)}",
        code="invalid_form",
    )
    try:
        form = await http.form(max_files=len(files), max_fields=most_fields, max_part_size=most_field_bytes)
    except HTTPException as e:
        raise e if e.status_code != 400 else unreadable from e
    except (ValueError, LookupError) as e:  # the parser's own errors, and unknown character sets
        raise unreadable from e
    found = Form({}, {})
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")
                _check_name(name, files, found.files)
                found.files[name] = await value.read()
            else:
                found.fields[name] = value
    finally:
        await form.close()
    return found


def checked_body(validate: Callable[[], B]) -> B:
    """A body that pydantic has checked. Raises RequestValidationError, as FastAPI does for the bodies that it reads."""
    try:
        return validate()
    except ValidationError as e:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in e.errors()]) from e


def _check_name(name: str, known: Sequence[str], there: dict[str, bytes]) -> None:
    if name not in known:
        raise Invalid(
            f"{name!r:.80} is not a file of this path",
            hint=f"send {', '.join(known)}",
            param=name[:80],
            code="unknown_parameter",
        )
    if name in there:
        raise Invalid(f"there are several files named {name}", hint="send one", param=name)
