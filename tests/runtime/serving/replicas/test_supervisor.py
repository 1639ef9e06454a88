"""The process that keeps the front running, without a front."""

from __future__ import annotations

import signal
import socket

import pytest

from ditc.runtime.serving.replicas import supervisor


class Front:
    """A process of a front that lives until it gets a signal.

    Args:
        on_start: called when it has been started, and nobody knows of it yet.
    """

    def __init__(self, on_start: object = None) -> None:
        self.signals: list[int] = []
        if callable(on_start):
            on_start()

    def poll(self) -> int | None:
        return 0 if self.signals else None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self) -> int:
        assert self.signals, "it would live for ever"
        return 0


def test_a_signal_between_two_fronts_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [-signal.SIGKILL]
    with socket.socket() as listener:
        made = supervisor._Supervisor(listener, "address", "namespace")
        monkeypatch.setattr(made, "_run_once", lambda *, again: codes.pop())
        monkeypatch.setattr(supervisor, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
        assert made.run() == 0
    assert not codes


def test_a_signal_while_a_front_is_started_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts: list[Front] = []

    def start(*args: object, **kwargs: object) -> Front:
        fronts.append(Front(lambda: signal.raise_signal(signal.SIGTERM)))
        return fronts[-1]

    monkeypatch.setattr(supervisor.subprocess, "Popen", start)
    with socket.socket() as listener:
        assert supervisor._Supervisor(listener, "address", "namespace").run() == 0
    assert [front.signals for front in fronts] == [[signal.SIGTERM]]
