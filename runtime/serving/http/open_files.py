"""How many files this process may have open. Each connection is one."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module

from ditc.runtime.serving.http.transport_limits import TransportLimits

log = logging.getLogger(__name__)

# Files that the server has open beside connections: bundles, libraries, event loops.
OTHER_FILES = 512


def with_open_files(limits: TransportLimits) -> TransportLimits:
    """Let this process open enough files for all connections, or lower their number to what the system allows."""
    try:
        resource = import_module("resource")  # Windows has neither the module nor the limit
    except ImportError:
        return limits
    wanted = limits.max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted:
        soft = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == unlimited or soft >= wanted:
        return limits
    possible = max(1, soft - OTHER_FILES)
    log.warning(
        "this process may open %d files, so it keeps at most %d connections instead of %d",
        soft,
        possible,
        limits.max_connections,
    )
    return replace(limits, max_connections=possible)
