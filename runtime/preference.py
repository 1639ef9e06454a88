"""In which order "auto" tries the backends, for one bundle on one machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ditc.runtime.bundle.bench_record import BenchEntry
from ditc.runtime.bundle.manifest import Artifact
from ditc.runtime.sessions.registry import find_row, row_of
from ditc.runtime.spec import Backend, Precision


def why_not(artifact: Artifact) -> str:
    """Why an artifact's backend cannot run it on this machine, though it runs others; "" if it can."""
    row = find_row(artifact.backend)
    return "" if row is None or row.cannot is None else row.cannot(artifact)


def in_order(
    runnable: Collection[Backend], denoisers: Iterable[Artifact], entry: BenchEntry | None = None
) -> tuple[list[Backend], dict[Backend, str]]:
    """The backends that "auto" tries, the best one first, and why some are not where the table has them.

    Engines keep the table's order. Among the others, those come first that can run a denoiser of the bundle; then those
    with the higher precision, because speed is no reason to lose precision; then the faster ones. Which is faster is
    taken from the bundle's record. Backends that it does not have are compared by what is known about CPUs.

    Args:
        runnable: the backends that can run on this machine, in the table's order.
        denoisers: the bundle's denoisers in the precision that is asked for.
        entry: what `ditc bench --record` measured on a machine of this kind.
    """
    held = list(denoisers)
    of = {name: [a for a in held if a.backend is name] for name in runnable}
    best = {name: _best(of[name]) for name in runnable if of[name] and not row_of(name).same_gpu}
    times = _recorded(best, entry)
    slower = _why_slower(times, best, entry)
    later = {
        name: why
        for name in runnable
        if of[name] and (why := slower.get(name, "") if name in times else _why_later(name))
    }

    def place(name: Backend) -> tuple[bool, bool, int, float, bool]:
        if name not in best:
            return (False, False, 0, 0.0, False)
        rank = list(Precision).index(best[name].precision)
        return (True, bool(why_not(best[name])), rank, times.get(name, 0.0), name in later)

    return sorted(runnable, key=place), later


def _best(artifacts: Sequence[Artifact]) -> Artifact:
    """The artifact of a backend that "auto" takes: one that runs here, in the highest precision."""
    return min(artifacts, key=lambda a: (bool(why_not(a)), list(Precision).index(a.precision)))


def _recorded(best: Mapping[Backend, Artifact], entry: BenchEntry | None) -> dict[Backend, float]:
    """Seconds per drawing of backends that compete in one precision, where the entry has all of these backends."""
    times: dict[Backend, float] = {}
    for precision in {artifact.precision for artifact in best.values()}:
        names = [name for name, a in best.items() if a.precision is precision and not why_not(a)]
        found = {name: entry.candidate(name, precision) if entry is not None else None for name in names}
        if len(names) > 1 and all(found.values()):
            times |= {name: measured.picture_s for name, measured in found.items() if measured is not None}
    return times


def _why_slower(
    times: Mapping[Backend, float], best: Mapping[Backend, Artifact], entry: BenchEntry | None
) -> dict[Backend, str]:
    """For every backend that another one of the same precision beats in the record, by how much."""
    why = {}
    for name, seconds in times.items():
        rivals = [other for other in times if best[other].precision is best[name].precision]
        first = min(rivals, key=lambda other: times[other])
        if first is not name and entry is not None:
            why[name] = (
                f"a drawing takes it {1e3 * seconds:.0f} ms, and {first} {1e3 * times[first]:.0f} ms, by the bundle's "
                f"record of {entry.date[:10]}"
            )
    return why


def _why_later(name: Backend) -> str:
    row = row_of(name)
    return "" if row.why_later is None else row.why_later(row)
