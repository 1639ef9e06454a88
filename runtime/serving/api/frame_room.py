"""The memory of decoded videos, bounded exactly: each video has its room from its acceptance until it is encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ditc.runtime.prepare import Plan
from ditc.runtime.serving.refusals import Overloaded

# A frame in memory has three bytes per pixel.
RGB_BYTES = 3
# When a video is encoded is not known.
RETRY_SECONDS = 5.0


def frame_bytes(plan: Plan) -> int:
    """The memory that the decoded frames of a request take; 0 for pictures."""
    return plan.height * plan.width * (plan.frames or 0) * plan.pictures * RGB_BYTES


class FrameRoom:
    """Counts bytes of frames. Threads can share it.

    Args:
        most: bytes of all videos together.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Callable[[], None]:
        """Take room for so many bytes. Returns what gives it back, of which only the first call counts.

        Raises:
            Overloaded: there is not enough. A request that would not fit into an empty room has no retry time.
        """
        with self._lock:
            if size > self.most:
                raise Overloaded(
                    f"the frames of this video are {size} bytes, and the server holds at most {self.most}",
                    hint="ask for fewer or smaller frames",
                    status=400,
                    code="too_much_work",
                )
            if self.taken + size > self.most:
                raise Overloaded(
                    f"the accepted videos have frames of {self.taken} of at most {self.most} bytes, and this one has "
                    f"{size}",
                    hint="come back later",
                    retry_after=RETRY_SECONDS,
                )
            self.taken += size
        owed = [size]

        def give_back() -> None:
            with self._lock:
                if owed:
                    self.taken -= owed.pop()

        return give_back
