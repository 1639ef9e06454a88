"""In which order "auto" tries the backends, for one bundle on one machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.registry import find_row, row_of
from ditc.runtime.spec import Backend, Precision


def why_not(artifact: Artifact) -> str:
    """Why an artifact's backend cannot run it on this machine, though it runs others; "" if it can."""
    row = find_row(artifact.backend)
    return "" if row is None or row.cannot is None else row.cannot(artifact)


def in_order(
    runnable: Collection[Backend], denoisers: Iterable[Artifact]
) -> tuple[list[Backend], dict[Backend, str]]:
    """The backends that "auto" tries, the best one first, and why some are not where the table has them.

    Engines keep the table's order. Among the others, those come first that can run a denoiser of the bundle; then those
    that are known to be faster here; then those with the higher precision: speed is no reason to lose precision.

    Args:
        runnable: the backends that can run on this machine, in the table's order.
        denoisers: the bundle's denoisers in the precision that is asked for.
    """
    of = {name: [a for a in denoisers if a.backend is name] for name in runnable}
    later = {name: why for name in runnable if of[name] and (why := _why_later(name))}

    def place(name: Backend) -> tuple[bool, bool, bool, int]:
        if row_of(name).same_gpu or not of[name]:
            return (False, False, False, 0)
        usable = [a for a in of[name] if not why_not(a)]
        ranks = [list(Precision).index(a.precision) for a in usable or of[name]]
        return (True, not usable, name in later, min(ranks))

    return sorted(runnable, key=place), later


def _why_later(name: Backend) -> str:
    row = row_of(name)
    return "" if row.why_later is None else row.why_later(row)
