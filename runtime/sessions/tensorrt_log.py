"""What TensorRT says, through one logger for each library and process.

A library keeps a bare pointer to the first logger that it is given for as long as any builder or runtime lives, and
ignores the others ("The logger passed into createInferRuntime differs from one already registered for an existing
builder, runtime, or refitter"). So builders and runtimes share one, which is never freed.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

# Said of every engine with streamed weights. What ditc hands over is the mapped file, which is no memory of its own.
HARMLESS = "Providing user-owned deserialization memory with weight streaming enabled"
KEPT = 1000  # messages: a process that runs for ever keeps no more, and a build says fewer


class MessageLog:
    """Warnings and errors of one library, and the logger that collects them.

    Attributes:
        count: of all messages so far: a mark for `since`.
        pass_on: hand warnings to `logging`, too. A build reports its own; a runtime has nowhere else to say them.
    """

    def __init__(self, trt: Any) -> None:
        self.count = 0
        self.pass_on = False
        self.logger = _make_logger(trt, self)
        self._kept: deque[tuple[str, str]] = deque(maxlen=KEPT)

    def add(self, severity: str, text: str) -> None:
        """Keep a message."""
        self._kept.append((severity, text))
        self.count += 1
        if self.pass_on and severity == "WARNING" and not text.startswith(HARMLESS):
            log.warning("%s", text)

    def since(self, mark: int) -> list[tuple[str, str]]:
        """Severity and text of what was said after a mark, oldest first."""
        return list(self._kept)[-(self.count - mark) :] if self.count > mark else []

    def errors(self, mark: int) -> list[str]:
        """What was logged as an error after a mark, oldest first."""
        return [text for severity, text in self.since(mark) if severity in ("ERROR", "INTERNAL_ERROR")]


@cache
def message_log(trt: Any) -> MessageLog:
    """The one of this library."""
    return MessageLog(trt)


def _make_logger(trt: Any, kept: MessageLog) -> Any:
    ignored = (trt.ILogger.VERBOSE, trt.ILogger.INFO)

    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity not in ignored:
                kept.add(severity.name, text)

    return Logger()
