"""The keys that clients show: a JSON file of names, keys and limits, read strictly and compared in constant time.

    {"keys": [
      {"name": "alice", "key": "4wUK9_6yBq...", "requests_per_minute": 60, "concurrent_requests": 4},
      {"name": "ops", "key": "sdWq3Ue0Zt...", "admin": true}
    ]}

`python -c "import secrets; print(secrets.token_urlsafe(32))"` makes a key. No key is kept in memory, in a log or in an
error, only its digest.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from ditc.runtime.bundle.jsondata import Mismatch, check_numbers, from_json
from ditc.runtime.errors import UsageError

log = logging.getLogger(__name__)

# Shorter keys can be guessed over the network.
SHORTEST_KEY, LONGEST_KEY = 16, 256
LARGEST_FILE = 2**20
_KEY = re.compile(r"[\x21-\x7e]+")  # what an Authorization header can hold, without spaces
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAKE_KEY = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What the owner of a key may use. None is without a limit.

    Attributes:
        requests_per_minute: so many at once, and then one in each fraction of a minute.
        concurrent_requests: requests that are answered at a time, and drawings in work at a time.
        pixel_steps_per_minute: width x height x steps of the pictures that are begun, in the same way as requests.
    """

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    pixel_steps_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of the file.

    Attributes:
        name: for logs and metrics.
        digest: SHA-256 of the key.
        admin: whether it opens /admin.
    """

    name: str
    digest: bytes
    admin: bool
    limits: KeyLimits


def digest_of_key(key: bytes) -> bytes:
    """What is kept of a key. Keys are long and random, so a fast hash without salt does not help to guess them."""
    return hashlib.sha256(key).digest()


def find_key(keys: Sequence[Key], shown: bytes) -> Key | None:
    """The key that a client has shown. All are compared, so that the time says nothing about any of them."""
    digest, found = digest_of_key(shown), None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a file of keys.

    Raises:
        UsageError: it cannot be read, is not of this form, or others may write it. No message holds a key.
    """
    try:
        with path.open("rb") as file:
            _check_access(path, os.fstat(file.fileno()))
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "this is not a path"
        raise UsageError(
            f"cannot read the keys {path}: {reason}", hint="name a file of keys that this user may read"
        ) from e
    if len(data) > LARGEST_FILE:
        raise UsageError(f"{path} has more than {LARGEST_FILE} bytes", hint="give a file of keys")
    entries = _parsed(path, data).keys
    if not entries:
        raise UsageError(f"{path} has no keys", hint=_MAKE_KEY)
    for attribute in ("name", "key"):
        values = [getattr(entry, attribute) for entry in entries]
        for number, value in enumerate(values):
            if value in values[:number]:
                raise UsageError(
                    f"{path}: keys {values.index(value)} and {number} have the same {attribute}",
                    hint="give every key a name and a value of its own",
                )
    return tuple(entry.as_key() for entry in entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry(KeyLimits):
    name: str
    key: str = field(repr=False)
    admin: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError("a name has 1 to 64 letters, digits, dots, dashes and underscores")
        if not SHORTEST_KEY <= len(self.key) <= LONGEST_KEY or not _KEY.fullmatch(self.key):
            raise ValueError(
                f"the key of {self.name} must have {SHORTEST_KEY} to {LONGEST_KEY} characters of ASCII without spaces"
            )
        for limit in fields(KeyLimits):
            value = getattr(self, limit.name)
            if value is not None and value < 1:
                raise ValueError(f"{limit.name} of {self.name} is {value}, and must be 1 or more")

    def as_key(self) -> Key:
        limits = KeyLimits(**{limit.name: getattr(self, limit.name) for limit in fields(KeyLimits)})
        return Key(name=self.name, digest=digest_of_key(self.key.encode()), admin=self.admin, limits=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    keys: tuple[_Entry, ...]


def _parsed(path: Path, data: bytes) -> _File:
    hint = 'the form is {"keys": [{"name": "alice", "key": "..."}]}'
    try:
        parsed = json.loads(data)
        check_numbers(parsed)
        return from_json(_File, parsed)
    except Mismatch as e:
        problem = str(e).split(", got ")[0]  # what follows could be a key
        raise UsageError(f"{path}: {problem}", hint=hint) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not valid JSON", hint=hint) from None


def _check_access(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is not a file", hint="name a file of keys in JSON")
    if os.name == "posix":
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(f"other users may change the keys {path}", hint="forbid it with chmod go-w")
        with suppress(OSError):
            if found.st_mode & (stat.S_IRGRP | stat.S_IROTH):
                log.warning("other users may read the keys %s; forbid it with chmod go-rwx", path)
