"""A candidate's process, as the process that compares them sees it."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from ditc.runtime.bench.choices import Candidate
from ditc.runtime.child_process import Child, raised
from ditc.runtime.errors import SessionError
from ditc.runtime.load_options import as_json

WORKER = "ditc.runtime.bench.worker"


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
        begin = perf_counter()
        self._child = Child(WORKER)
        try:
            loaded = self.ask("load", bundle=str(bundle), options=as_json(candidate.options))
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
        try:
            self._child.send(json.dumps({"do": do, **arguments}))
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SessionError(
                f"{self.candidate.name}: its process {self._child.how_it_ended()}",
                hint="if memory ran out, compare fewer candidates, or smaller pictures or batches",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise raised(answer, f"{self.candidate.name}: ")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
