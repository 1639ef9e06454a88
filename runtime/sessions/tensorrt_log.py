"""The messages of TensorRT, which come through one logger per library and process.

A library keeps a bare pointer to the first logger that it gets, as long as any builder or runtime exists, and ignores
others ("The logger passed into createInferRuntime differs from one already registered for an existing builder, runtime,
or refitter"). Therefore all builders and runtimes share one logger, which is never freed.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

# The library gives this warning for every engine with streamed weights. ditc passes the mapped file, which takes no
# memory of its own, so the warning does not apply.
HARMLESS = "Providing user-owned deserialization memory with weight streaming enabled"
MAX_MESSAGES = 1000  # enough for every build, and a bound for servers that run for a long time


class MessageLog:
    """The warnings and errors of one library, and the logger that collects them.

    Attributes:
        count: the number of all messages so far. It can be given to `since` and `errors` later.
        pass_on: also pass warnings to `logging`. Builds report warnings by themselves, but running engines do not.
        logger: the object that is given to the library.
    """

    def __init__(self, trt: Any) -> None:
        self.count = 0
        self.pass_on = False
        self.logger = _make_logger(trt, self)
        self._kept: deque[tuple[str, str]] = deque(maxlen=MAX_MESSAGES)

    def add(self, severity: str, text: str) -> None:
        """Add a message."""
        self._kept.append((severity, text))
        self.count += 1
        if self.pass_on and severity == "WARNING" and not text.startswith(HARMLESS):
            log.warning("%s", text)

    def since(self, count: int) -> list[tuple[str, str]]:
        """Severity and text of the messages after the first `count`, oldest first."""
        return list(self._kept)[-(self.count - count) :] if self.count > count else []

    def errors(self, count: int) -> list[str]:
        """The errors after the first `count` messages, oldest first."""
        return [text for severity, text in self.since(count) if severity in ("ERROR", "INTERNAL_ERROR")]


@cache
def message_log(trt: Any) -> MessageLog:
    """The log of this library. There is one per process."""
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
