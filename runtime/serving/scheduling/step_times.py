"""How long the parts of a request take, by latent size and batch: measured at warm-up and in all work."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass

from ditc.runtime.serving.scheduling.policy import BatchKey

# The stages that make the rows of a text, as one part of the work.
TEXT = "text"
# The weight of the newest measurement. The machine's speed changes with heat and with what else runs.
NEWEST = 0.2
# A larger batch must be faster per picture by this factor, because its pictures all wait for its end.
GAIN = 1.03
# How many keys have measurements. Clients choose sizes and lengths of texts, so there could be any number of keys.
MAX_KEYS = 256


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that a StepTimes has measured.

    Attributes:
        steps: seconds of a step, by key and number of pictures.
        stages: seconds per unit of size of the other stages.
    """

    steps: dict[BatchKey, dict[int, float]]
    stages: dict[str, float]


class StepTimes:
    """Estimates from measurements. Threads can share it.

    Args:
        max_batch: the most pictures of one run.
        buckets: the batch sizes that the session has graphs for, ascending; () if it takes any size. Others are padded
            to the next one, and take its time.
    """

    def __init__(self, max_batch: int, buckets: tuple[int, ...] = ()) -> None:
        self.max_batch = max_batch
        self.buckets = buckets
        self._lock = threading.Lock()
        self._known: dict[BatchKey, dict[int, float]] = {}  # the oldest first
        self._nearest: dict[int, BatchKey] = {}  # for a weight, the known key whose weight is nearest
        self._stages: dict[str, float] = {}  # seconds per unit of size
        self._curve: BatchKey | None = (
            None  # the key with the most sizes; those of other keys follow its shape
        )

    def record(self, key: BatchKey, size: int, seconds: float) -> None:
        """Add a measurement of one step of `size` pictures."""
        key = key.timed
        size = self._run_size(size)
        with self._lock:
            if key not in self._known:
                self._make_room()
            sizes = self._known.setdefault(key, {})
            before = sizes.get(size)
            sizes[size] = seconds if before is None else before + NEWEST * (seconds - before)
            if self._curve is None or len(sizes) > len(self._known[self._curve]):
                self._curve = key

    def seconds(self, key: BatchKey, size: int = 1) -> float:
        """The estimated time of one step. 0 if nothing has been measured."""
        key = key.timed
        with self._lock:
            return self._estimate(key, self._run_size(size))

    def best_size(self, key: BatchKey, most: int) -> int:
        """The number of pictures, at most `most`, of which a step is fastest per picture.

        Of sizes that are about as fast it is the smallest.
        """
        most, key = min(most, self.max_batch), key.timed
        best = 1
        with self._lock:
            fastest = self._estimate(key, self._run_size(1))
            for size in range(2, most + 1):
                per_picture = self._estimate(key, self._run_size(size)) / size
                if per_picture * GAIN < fastest:
                    best, fastest = size, per_picture
        return best

    def record_stage(self, name: str, size: int, seconds: float) -> None:
        """Add a measurement of another stage, for work of this size: pixels of a picture, or a number of texts."""
        with self._lock:
            before = self._stages.get(name)
            now = seconds / size
            self._stages[name] = now if before is None else before + NEWEST * (now - before)

    def stage_seconds(self, name: str, size: int) -> float:
        """The estimated time of such a stage. 0 if it has not been measured."""
        with self._lock:
            return self._stages.get(name, 0.0) * size

    def measured(self) -> dict[BatchKey, dict[int, float]]:
        """All estimates that rest on measurements of their own."""
        with self._lock:
            return {key: dict(sizes) for key, sizes in self._known.items()}

    def snapshot(self) -> Measurements:
        """All measurements, for `take_over` in another process."""
        with self._lock:
            return Measurements({key: dict(sizes) for key, sizes in self._known.items()}, dict(self._stages))

    def take_over(self, measured: Measurements) -> None:
        """Replace all measurements by those of another process."""
        with self._lock:
            self._known = {key: dict(sizes) for key, sizes in measured.steps.items()}
            self._stages = dict(measured.stages)
            self._nearest.clear()
            self._curve = max(self._known, key=lambda key: len(self._known[key]), default=None)

    def _make_room(self) -> None:
        self._nearest.clear()
        if len(self._known) >= MAX_KEYS:
            del self._known[next(key for key in self._known if key != self._curve)]

    def _run_size(self, size: int) -> int:
        return next((bucket for bucket in self.buckets if bucket >= size), size)

    def _estimate(self, key: BatchKey, size: int) -> float:
        if self._curve is None:
            return 0.0
        sizes = self._known.get(key, {})
        if size in sizes:
            return sizes[size]
        if sizes:
            nearest = min(sizes, key=lambda known: abs(known - size))
            return sizes[nearest] * self._relative(size) / self._relative(nearest)
        weight = key.weight
        if weight not in self._nearest:
            if len(self._nearest) >= MAX_KEYS:
                self._nearest.clear()
            self._nearest[weight] = min(self._known, key=lambda known: abs(known.weight - weight))
        other = self._nearest[weight]
        return self._estimate(other, size) * weight / other.weight

    def _relative(self, size: int) -> float:
        """The time of a step of `size` pictures by the measurements of the key that has most of them."""
        assert self._curve is not None
        points = sorted(self._known[self._curve].items())
        sizes = [known for known, _ in points]
        place = bisect_left(sizes, size)
        if place < len(points) and sizes[place] == size:
            return points[place][1]
        if place == 0 or place == len(points):  # outside of what was measured, time is proportional to size
            known, seconds = points[0] if place == 0 else points[-1]
            return seconds * size / known
        (low, before), (high, after) = points[place - 1], points[place]
        return before + (after - before) * (size - low) / (high - low)
