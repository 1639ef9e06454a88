"""`ditc serve --ray` itself: starts Ray, opens the socket, and keeps the front running.

A front that is killed is started again, and finds the replicas as they were. Its clients' connections break; new ones
wait in the socket meanwhile. This process does little, so that little can end it.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from time import monotonic, sleep
from types import FrameType

from ditc.runtime.commands.serve_arguments import named_bundles
from ditc.runtime.load_options import load_options
from ditc.runtime.serving.http.access import doorkeeper_for
from ditc.runtime.serving.http.server import listen
from ditc.runtime.serving.replicas.cluster import start_ray, stop_ray
from ditc.runtime.serving.replicas.front import options_of
from ditc.runtime.serving.replicas.place import Place
from ditc.runtime.serving.settings import ServerOptions

log = logging.getLogger(__name__)

# A front that lives for less than so many seconds has failed at its start. After so many of them it is not tried again.
_SHORT_LIFE, _MOST_FAILED = 10.0, 5
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


def supervise(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the server. Returns the exit code of the front.

    Raises:
        DitcError: Ray is not installed or cannot be used, the address cannot be used, or an option is wrong.
    """
    options = ServerOptions(
        host=arguments.host,
        port=arguments.port,
        warm_up_seconds=arguments.warm_up_seconds,
        drain_seconds=arguments.drain_seconds,
    )
    replicas = options_of(arguments, load_options(arguments))
    doorkeeper_for(options.host, arguments.api_keys, browsers=arguments.ui)
    named_bundles(arguments)
    namespace = f"ditc-serve-{secrets.token_hex(8)}"
    with listen(options) as listener:
        address = start_ray(replicas)
        try:
            return _Supervisor(listener, address, namespace).run()
        finally:
            listener.close()  # at once, so that no new connection waits in it for an answer
            stop_ray(namespace)


class _Supervisor:
    def __init__(self, listener: socket.socket, address: str, namespace: str) -> None:
        self._listener, self._address, self._namespace = listener, address, namespace
        self._front: subprocess.Popen[bytes] | None = None  # None while the next one is started
        self._ending = False
        self._to_pass_on: int | None = None  # the signal to end that came meanwhile

    def run(self) -> int:
        """Keep a front running until it ends by itself or is told to."""
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        failed, again = 0, False
        try:
            while not self._ending:
                began = monotonic()
                code = self._run_once(again=again)
                if self._ending or code >= 0:
                    return code if code >= 0 else 128 - code
                failed = failed + 1 if monotonic() - began < _SHORT_LIFE else 0
                if failed == _MOST_FAILED:
                    log.error("the front was ended by a signal %d times in a row", failed)
                    return 1
                log.error("the front was ended by signal %d, and is started again", -code)
                again = True
                sleep(0.2 * failed)
            return 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_once(self, *, again: bool) -> int:
        number, self._front = self._listener.fileno(), None
        place = Place(
            address=self._address,
            namespace=self._namespace,
            socket=number,
            again=again,
            supervisor=os.getpid(),
        )
        self._front = subprocess.Popen(
            [sys.executable, "-m", "ditc.runtime.cli", *sys.argv[1:]],
            env=place.environment(),
            pass_fds=(number,),
            start_new_session=True,  # ctrl-C comes here alone, and is passed on
        )
        if self._to_pass_on is not None:
            self._front.send_signal(self._to_pass_on)
            self._to_pass_on = None
        return self._front.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        ends = number in (signal.SIGTERM, signal.SIGINT)
        self._ending |= ends
        if self._front is not None and self._front.poll() is None:
            self._front.send_signal(number)
        elif ends:  # the next front reads everything anew, as SIGHUP asks
            self._to_pass_on = number
