"""Who may do what: every request passes here, and what is not allowed is refused, whether or not its path exists.

With a file of keys, a request needs one of them in `Authorization: Bearer KEY`. Without one, only programs on this
machine can reach the server, and web pages that a browser on it shows are kept out: they can send requests to loopback
addresses too, under a name that they let point there (DNS rebinding), or without reading the answer.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.http.callers import Caller
from ditc.runtime.serving.http.keys import LONGEST_KEY, SHORTEST_KEY, Key, find_key, read_keys
from ditc.runtime.serving.refusals import NeedsKey, Refusal

log = logging.getLogger(__name__)

# What supervisors and load balancers ask, who have no key. Everything else needs one.
OPEN_PATHS = frozenset({"/livez", "/readyz"})
ADMIN = "/admin"
# The page's files and events, of which a browser asks for dozens at a time, do not count as requests of a key.
PAGE = "/ui/"

Headers = Iterable[tuple[bytes, bytes]]
_BEARER = re.compile(rb"bearer +([\x21-\x7e]{%d,%d})" % (SHORTEST_KEY, LONGEST_KEY), re.IGNORECASE)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]{1,1024})", re.IGNORECASE)


class Doorkeeper(Protocol):
    """Says who sends a request."""

    def caller(self, headers: Headers) -> Caller:
        """Raises Refusal if they may not come in."""
        ...

    def reload(self) -> None:
        """Read again who may. Raises UsageError, and then nothing changes."""
        ...


class KeyHolders:
    """Only owners of keys come in.

    Args:
        path: of the file of keys.
        browsers: also take a key as the password of Basic authentication, which browsers ask their users for. Browsers
            send it along with requests of other sites' pages too, so those are refused.

    Raises:
        UsageError: as `read_keys`.
    """

    def __init__(self, path: Path, *, browsers: bool = False) -> None:
        self._path, self._browsers = path, browsers
        self._keys: tuple[Key, ...] = ()
        self._callers: dict[str, Caller] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again. What callers have used still counts, unless their limits have changed.

        Raises:
            UsageError: as `read_keys`. Then the keys stay as they were.
        """
        keys, callers = read_keys(self._path), {}
        for key in keys:
            known = self._callers.get(key.name)
            same = known is not None and (known.admin, known.limits) == (key.admin, key.limits)
            callers[key.name] = (
                known if known is not None and same else Caller(key.name, admin=key.admin, limits=key.limits)
            )
        self._callers = callers
        self._keys = keys

    def caller(self, headers: Headers) -> Caller:
        """The owner of the key in the headers. Raises Refusal (401, or 403 for pages of others)."""
        sent = [value for name, value in headers if name == b"authorization"]
        if not sent:
            raise self._needs_key("this server needs a key", code="missing_api_key")
        shown = _shown_key(sent[0].strip(), self._browsers) if len(sent) == 1 else None
        key = None if shown is None else find_key(self._keys, shown)
        caller = None if key is None else self._callers.get(key.name)
        if caller is None:
            raise self._needs_key("the key is wrong", code="invalid_api_key")
        if self._browsers:
            refuse_pages_of_others(headers)
        return caller

    def _needs_key(self, message: str, code: str) -> NeedsKey:
        refusal = NeedsKey(message, hint="send Authorization: Bearer KEY", code=code)
        if self._browsers:
            refusal.challenge = (
                'Basic realm="ditc", charset="UTF-8"'  # of several, browsers see the first one only
            )
        return refusal


class LocalPrograms:
    """Everybody on this machine comes in, except web pages of others. Nobody is an administrator."""

    def __init__(self) -> None:
        self._caller = Caller("local")

    def reload(self) -> None:
        """There is nothing to read."""

    def caller(self, headers: Headers) -> Caller:
        """The one caller. Raises Refusal (403)."""
        sent: dict[bytes, bytes] = dict(
            headers
        )  # HTTP/1.1 allows one Host, and browsers send each of these once
        host = sent.get(b"host", b"").decode("latin-1").lower()
        if not _is_loopback(_name_of(host)):
            raise Refusal(
                "a server without keys answers only under the names of this machine",
                hint="use http://localhost or http://127.0.0.1 with its port, or start the server with --api-keys",
                status=403,
                code="wrong_host",
            )
        refuse_pages_of_others(headers)
        return self._caller


class Access:
    """The layer of the application that gives `scope["state"]["caller"]` and `["key_name"]`, or refuses."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self.app, self.doorkeeper = app, doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        caller = self.doorkeeper.caller(scope["headers"])
        state = scope.setdefault("state", {})
        state["caller"], state["key_name"] = caller, caller.name
        path = scope["path"]
        if (path == ADMIN or path.startswith(ADMIN + "/")) and not caller.admin:
            raise Refusal(
                "this path is for administrators",
                hint='use a key with "admin": true',
                status=403,
                code="not_an_administrator",
            )
        with nullcontext() if scope["method"] == "GET" and path.startswith(PAGE) else caller.request():
            await self.app(scope, receive, send)


def doorkeeper_for(host: str, keys: Path | None, *, browsers: bool = False) -> KeyHolders | LocalPrograms:
    """Who decides who comes in.

    Args:
        host: the address that the server will listen on.
        keys: the file of keys, if there is one.
        browsers: as for `KeyHolders`.

    Raises:
        UsageError: without keys, others could reach the server; or the file cannot be used.
    """
    check_binding(host, keys)
    return LocalPrograms() if keys is None else KeyHolders(keys, browsers=browsers)


def reload_keys(doorkeeper: Doorkeeper) -> bool:
    """Read the keys again. False if they cannot be used, which is logged; then they stay as they were."""
    try:
        doorkeeper.reload()
    except UsageError as e:
        log.error("reload: the keys stay as they were: %s", e)
        return False
    return True


def check_binding(host: str, keys: Path | None) -> None:
    """Refuse to listen without keys where other machines can connect. Raises UsageError."""
    if keys is None and not _is_loopback(host):
        raise UsageError(
            f"without keys, every machine that reaches {host or 'this address'} could use the server",
            hint="give a file of keys with --api-keys, or listen on 127.0.0.1",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name; what it points to may change
        return False


def _name_of(host: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]")


def refuse_pages_of_others(headers: Headers) -> None:
    """Raise Refusal (403) if the page of another origin sends this. Links to a page of the server may be followed."""
    sent: dict[bytes, bytes] = dict(headers)
    host, origin = sent.get(b"host", b"").lower(), sent.get(b"origin")
    if origin is not None:
        foreign = origin.lower() not in (b"http://" + host, b"https://" + host)
    else:
        foreign = (
            sent.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
            and sent.get(b"sec-fetch-mode") != b"navigate"
        )
    if foreign:
        raise Refusal("web pages of others may not use this server", status=403, code="wrong_origin")


def _shown_key(authorization: bytes, browsers: bool) -> bytes | None:
    """The key in an Authorization header. None if it has another form."""
    bearer = _BEARER.fullmatch(authorization)
    if bearer is not None:
        return bearer[1]
    basic = _BASIC.fullmatch(authorization) if browsers else None
    if basic is None:
        return None
    try:
        return base64.b64decode(basic[1], validate=True).partition(b":")[2]
    except ValueError:
        return None
