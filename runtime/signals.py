"""Ends a command on SIGTERM and SIGHUP as on ctrl-C: temporary files are removed before the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP comes when a terminal is closed. Windows has none.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end. It passes through whatever a ctrl-C passes through."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def endings_as_interrupts() -> Iterator[None]:
    """Raise Terminated in the main thread when one of the signals comes.

    A signal that is ignored, as SIGHUP under nohup, stays so, and so does a handler of the program around ditc.
    """
    here = threading.current_thread() is threading.main_thread()
    replaced = [number for number in ENDING if here and signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
