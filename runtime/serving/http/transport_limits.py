"""Bounds of what clients do to the connection itself: one dataclass for the API and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from ditc.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportLimits:
    """How much, and how long, before a request is known to be good.

    Attributes:
        max_connections: open ones. One more closes the one that has been idle longest, and is refused if none is idle.
        max_open_requests: requests that are answered at one time, streams of events among them.
        max_header_bytes: of one request line with its headers.
        max_body_bytes: of one body, before it is parsed.
        max_upload_bytes: the same where pictures are uploaded.
        max_buffered_bytes: of all bodies that are in memory.
        header_timeout: seconds for a request line with its headers.
        body_timeout: seconds for a body.
        write_timeout: seconds that a client may leave its answer unread.
        keep_alive_timeout: seconds that a connection may be idle.

    Raises:
        UsageError: a bound is not positive.
    """

    max_connections: int = 1024
    max_open_requests: int = 256
    max_header_bytes: int = 2**14
    max_body_bytes: int = 2**20
    max_upload_bytes: int = 2**24
    max_buffered_bytes: int = 2**28
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive_timeout: float = 15.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:  # also NaN
                raise UsageError(f"{_flag(field.name)} is {value}", hint="choose a positive number")


DEFAULTS = TransportLimits()

_OPTIONS = {
    "max_connections": (
        "CONNECTIONS",
        "The most open connections. One more closes the one that has been idle longest, and is refused if none is idle",
    ),
    "max_open_requests": (
        "REQUESTS",
        "The most requests that are answered at one time, streams of events among them",
    ),
    "max_header_bytes": ("BYTES", "The most bytes of a request line with its headers"),
    "max_body_bytes": ("BYTES", "The most bytes of the body of a request"),
    "max_upload_bytes": ("BYTES", "The most bytes of the body of a request that uploads pictures"),
    "max_buffered_bytes": ("BYTES", "The most bytes of the bodies of all requests that are in memory"),
    "header_timeout": ("SECONDS", "How many seconds the headers of a request may take to arrive"),
    "body_timeout": ("SECONDS", "How many seconds the body of a request may take to arrive"),
    "write_timeout": ("SECONDS", "How many seconds a client may leave its answer unread"),
    "keep_alive_timeout": ("SECONDS", "How many seconds a connection may be idle"),
}


def add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line that `transport_limits` reads."""
    for name, (metavar, help_text) in _OPTIONS.items():
        default = getattr(DEFAULTS, name)
        parser.add_argument(
            _flag(name),
            dest=name,
            type=type(default),
            default=default,
            metavar=metavar,
            help=f"{help_text} (default: %(default)s).",
        )


def transport_limits(arguments: argparse.Namespace) -> TransportLimits:
    """The limits that were parsed. Raises UsageError as TransportLimits does."""
    return TransportLimits(**{name: getattr(arguments, name) for name in _OPTIONS})


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
