"""Memory for what clients ask for, bounded exactly: room is taken before it is needed, and given back once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from ditc.runtime.bundle.manifest import Manifest
from ditc.runtime.prepare import Plan
from ditc.runtime.serving.refusals import Overloaded
from ditc.runtime.spec import VAE_DECODER_NEXT

# A frame in memory has three bytes per pixel, and a decoder gives it in fp32.
RGB_BYTES, DECODED_BYTES = 3, 12
# When room is given back is not known.
RETRY_SECONDS = 5.0


@dataclass(frozen=True, eq=False, slots=True)
class Need:
    """The memory that one request needs.

    Attributes:
        size: in bytes, as long as it has its room.
        passing: bytes that it needs only while it is worked on.
        worker: works on one request at a time.
    """

    size: int
    passing: int = 0
    worker: Hashable = None


def video_need(plan: Plan, manifest: Manifest, worker: Hashable) -> Need:
    """What videos need: their frames until they are encoded and, of one decoded as a whole, what the decoder gives.

    A decoder that takes one latent frame at a time gives only few frames. Pictures need nothing here.

    Args:
        worker: decodes one video at a time.
    """
    if plan.frames is None:
        return Need(0)
    frames = plan.height * plan.width * plan.frames * plan.pictures * RGB_BYTES
    whole = VAE_DECODER_NEXT not in manifest.stages
    passing = plan.drawn_height * plan.drawn_width * plan.frames * DECODED_BYTES if whole else 0
    return Need(frames, passing, worker)


class ByteRoom:
    """Counts bytes. Threads can share it.

    Args:
        most: bytes of all requests together.
        what: what they are needed for, for errors: a plural.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self._what = most, what
        self._held: dict[Need, None] = {}
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """How many bytes are taken."""
        with self._lock:
            return _bytes(self._held)

    def take(self, need: Need) -> Callable[[], None]:
        """Take room. Returns what gives it back, of which only the first call counts.

        Raises:
            Overloaded: there is not enough. A request that would not fit into an empty room has no retry time.
        """
        alone = _bytes((need,))
        if alone > self.most:
            raise Overloaded(
                f"the {self._what} of this request need {alone} bytes of memory, of at most {self.most} for all",
                hint="ask for fewer or smaller ones",
                status=400,
                code="too_much_work",
            )
        with self._lock:
            if _bytes((*self._held, need)) > self.most:
                raise Overloaded(
                    f"the {self._what} of other requests take {_bytes(self._held)} of at most {self.most} bytes of "
                    f"memory, and those of this one need {alone}",
                    hint="come back later",
                    retry_after=RETRY_SECONDS,
                )
            self._held[need] = None

        def give_back() -> None:
            with self._lock:
                self._held.pop(need, None)

        return give_back


def _bytes(needs: Iterable[Need]) -> int:
    """What they need together. A worker is at one of its requests at a time, which may be the largest."""
    total, passing = 0, dict[Hashable, int]()
    for need in needs:
        total += need.size
        passing[need.worker] = max(passing.get(need.worker, 0), need.passing)
    return total + sum(passing.values())
