"""The process that keeps the front running, without a front."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from ditc.runtime.serving.replicas import front, supervisor


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


def test_a_signal_right_before_the_next_front_is_started_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fronts = list[int](), list[Front]()

    class Killed(Front):
        def poll(self) -> int:
            return -signal.SIGKILL

        def wait(self) -> int:
            return -signal.SIGKILL

    def start(*args: object, **kwargs: object) -> Front:
        fronts.append(Front() if fronts else Killed())
        return fronts[-1]

    def clock() -> float:
        calls.append(1)
        if len(calls) == 3:  # the second front is not yet started, and the first one has ended
            signal.raise_signal(signal.SIGTERM)
        return 0.0

    monkeypatch.setattr(supervisor.subprocess, "Popen", start)
    monkeypatch.setattr(supervisor, "monotonic", clock)
    monkeypatch.setattr(supervisor, "sleep", lambda seconds: None)
    with socket.socket() as listener:
        assert supervisor._Supervisor(listener, "address", "namespace").run() == 0
    assert [front.signals for front in fronts] == [[], [signal.SIGTERM]]


def test_nobody_waits_for_an_answer_while_ray_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, refused = socket.create_server(("127.0.0.1", 0)), list[bool]()
    address = listener.getsockname()

    def stop_ray(namespace: str) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
        refused.append(True)

    for name, value in {
        "options_of": lambda *_: None,
        "load_options": lambda *_: None,
        "named_bundles": lambda *_: None,
        "start_ray": lambda *_: "address",
        "listen": lambda *_: listener,
        "stop_ray": stop_ray,
    }.items():
        monkeypatch.setattr(supervisor, name, value)
    monkeypatch.setattr(supervisor._Supervisor, "run", lambda self: 0)
    arguments: Any = SimpleNamespace(
        host="127.0.0.1", port=0, warm_up_seconds=0.0, drain_seconds=1.0, api_keys=None, ui=False
    )
    assert supervisor.supervise(arguments) == 0 and refused


def test_a_front_ends_whose_supervisor_ended_while_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took whoever had inherited it for its supervisor, and kept the port."""
    sent = list[tuple[int, int]]()
    monkeypatch.setattr(front.os, "kill", lambda *of: sent.append(of))
    with subprocess.Popen(["true"]) as ended:
        pass
    front._end_without_supervisor(ended.pid)
    assert sent == [(os.getpid(), signal.SIGTERM)]
