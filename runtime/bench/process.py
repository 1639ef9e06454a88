"""A candidate's process, as the process that compares them sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from ditc.runtime.bench.choices import Candidate
from ditc.runtime.bench.worker import as_arguments
from ditc.runtime.errors import BundleError, DitcError, NumericsError, OutputError, SessionError, UsageError

COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "ditc.runtime.bench.worker",
)  # -P: import nothing from the current folder
# What an answer may say was raised. All else counts as an error of the session.
KINDS: dict[str, type[DitcError]] = {
    kind.__name__: kind for kind in (UsageError, OutputError, BundleError, SessionError, NumericsError)
}
# How long an idle process may take to end before it is killed.
END_S = 10.0


class Process:
    """Runs one candidate in a process of its own, from the start of Python on.

    Args:
        bundle: the bundle's directory.

    Attributes:
        start_s: from the start of the process until ditc was imported.
        load_s: from then on until all stages were loaded.
        loaded_bytes: the largest memory until then; None where the system does not say.
    """

    def __init__(self, candidate: Candidate, bundle: Path) -> None:
        self.candidate = candidate
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        begin = perf_counter()
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
        )
        try:
            loaded = self.ask("load", bundle=str(bundle), options=as_arguments(candidate.options))
        except BaseException:
            self.close()
            raise
        self.load_s: float = loaded["seconds"]
        self.start_s = perf_counter() - begin - self.load_s
        self.loaded_bytes: int | None = loaded["peak_bytes"]
        self.chosen: str = loaded["chosen"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to a request; worker.py lists them.

        Raises:
            DitcError: what the process answered, with the candidate's name; or it has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(answer)
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        process = self._process
        try:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(END_S)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._messages.close()

    def _ended(self) -> SessionError:
        code = self._process.wait()
        self._messages.seek(max(0, self._messages.seek(0, os.SEEK_END) - 4096))
        said = self._messages.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = f": {said[-1]:.300}" if said else ""
        return SessionError(
            f"{self.candidate.name}: its process {how}{last}",
            hint="if memory ran out, compare fewer candidates, or smaller pictures or batches",
        )

    def _error(self, answer: dict[str, Any]) -> DitcError:
        kind = KINDS.get(answer["error"], SessionError)
        return kind(f"{self.candidate.name}: {answer['message']}", hint=answer["hint"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
