"""Processes of ditc's own that read JSON lines from stdin and answer with JSON lines on stdout.

Nothing but JSON passes between the processes. A child ends when its input does, and so with its parent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from ditc.runtime.errors import (
    BundleError,
    DitcError,
    NumericsError,
    OutputError,
    SessionError,
    UsageError,
)

# What a child may say was raised. All else counts as an error of the session.
KINDS: dict[str, type[DitcError]] = {
    kind.__name__: kind for kind in (UsageError, OutputError, BundleError, SessionError, NumericsError)
}
# How long an idle process may take to end before it is killed.
END_S = 10.0


class Child:
    """A started process.

    Args:
        module: is run as the main module.
    """

    def __init__(self, module: str) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            (sys.executable, "-P", "-m", module),  # -P: import nothing from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout

    def send(self, line: str) -> None:
        """Write one line. Raises BrokenPipeError if the process has ended."""
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def how_it_ended(self) -> str:
        """Its exit code or signal, and its last message, in words. Waits for its end."""
        code = self.process.wait()
        self._messages.seek(max(0, self._messages.seek(0, os.SEEK_END) - 4096))
        said = self._messages.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{how}{f': {said[-1]:.300}' if said else ''}"

    def close(self, *, at_once: bool = False) -> None:
        """End the process.

        Args:
            at_once: kill it. Otherwise it has some seconds to end what it does.
        """
        try:
            if at_once:
                self.process.kill()
            self.stdin.close()
            self.process.wait(END_S)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.stdout.close()
        self._messages.close()


def error_answer(error: DitcError) -> dict[str, Any]:
    """What a child answers instead of a result."""
    return {"error": type(error).__name__, "message": str(error), "hint": error.hint}


def raised(answer: Mapping[str, Any], prefix: str = "") -> DitcError:
    """The error that a child has answered."""
    return KINDS.get(answer["error"], SessionError)(f"{prefix}{answer['message']}", hint=answer["hint"])


def own_stdout() -> IO[str]:
    """For a child: the stream of its answers. What libraries write to stdout goes to stderr instead."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
