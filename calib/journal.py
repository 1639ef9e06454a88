"""What a search has measured already, kept in a file, so that a search that was killed goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from ditc.export.build.build_key import digest
from ditc.export.quant.plan import LayerPlan
from ditc.runtime.atomic import write_atomic

log = logging.getLogger(__name__)


class Journal:
    """Measured numbers by what was measured.

    Args:
        path: the file; None keeps the numbers in memory only.
        key: hash of everything that all numbers depend on. Numbers of another key are dropped.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[str, list[float]] = {}
        if path is not None and path.exists():
            self._known = _read(path, key)

    def get(
        self, what: str, plans: Mapping[str, LayerPlan], measure: Callable[[], list[float]]
    ) -> list[float]:
        """The numbers of `what` with these layers in 8 bits: from the file, or measured now and written to it."""
        name = f"{what} {digest({name: _facts(plan) for name, plan in plans.items()})}"
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                write_atomic(self._path, json.dumps({"key": self._key, "known": self._known}))
        return self._known[name]


def _facts(plan: LayerPlan) -> list[object]:
    if plan.input is None:
        return [plan.kind]
    factors = None if plan.input.smooth is None else plan.input.smooth.tobytes().hex()
    return [plan.kind, plan.input.amax, plan.input.per_token, factors]


def _read(path: Path, key: str) -> dict[str, list[float]]:
    try:
        data = json.loads(path.read_bytes())
        if data["key"] == key:
            return {str(name): [float(x) for x in values] for name, values in data["known"].items()}
        why = "it was measured with other weights, prompts or another ditc"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        why = str(e)
    log.warning("the search begins anew, because it cannot go on from %s: %s", path, why)
    return {}
