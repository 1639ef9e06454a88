"""What the supervisor of `ditc serve --ray` tells the front that it starts, in an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "DITC_RAY_FRONT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a front works.

    Attributes:
        address: of the Ray cluster.
        namespace: of the server's replicas.
        socket: the descriptor of the socket that it listens on.
        again: whether an earlier front has ended.
        supervisor: the process without which the front ends.
    """

    address: str
    namespace: str
    socket: int
    again: bool
    supervisor: int

    def environment(self) -> dict[str, str]:
        """The environment of this process, with the place."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}


def place() -> Place | None:
    """The place of this process; None if this process is not a front."""
    return Place(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None
