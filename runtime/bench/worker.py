"""The process that runs one candidate: it loads the bundle, draws on request and tells the times.

    python -m ditc.runtime.bench.worker        reads one JSON request per line, and writes one JSON answer per line

Every candidate has a process of its own, because the libraries' threads slow each other down in one process, and
because memory can only be told apart that way. The answer to a request is {"result": ...}, or {"error": the class of a
DitcError, "message": ..., "hint": ...}. The process ends when its input does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from ditc.runtime.bench.memory import peak_bytes
from ditc.runtime.bench.profile_run import FirstInputs, profile_stage
from ditc.runtime.bench.timed_sessions import TimedSession, timed
from ditc.runtime.child_process import error_answer, own_stdout
from ditc.runtime.control import example_picture
from ditc.runtime.errors import DitcError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request


def main() -> int:
    """Answer requests until there are no more."""
    answers, worker = own_stdout(), Worker()
    with answers:
        for line in sys.stdin:
            try:
                answer = {"result": worker.do(json.loads(line))}
            except DitcError as error:
                answer = error_answer(error)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    worker.close()
    return 0


class Worker:
    """What the process holds between two requests: the pipeline, and the clocks of its stages."""

    def __init__(self) -> None:
        self._bundle = Path()
        self._options = LoadOptions()
        self._pipeline: Pipeline | None = None
        self._clocked: Pipeline | None = None
        self._clocks: dict[str, TimedSession] = {}

    def do(self, asked: Mapping[str, Any]) -> Any:
        """Do what a request asks for by its "do"; its other entries are the arguments."""
        known: dict[str, Callable[..., Any]] = {"load": self.load, "draw": self.draw, "profile": self.profile}
        return known[asked["do"]](**{name: value for name, value in asked.items() if name != "do"})

    def load(self, bundle: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Load the bundle. Seconds, and the largest memory so far."""
        self._bundle, self._options = Path(bundle), LoadOptions(**options)
        begin = perf_counter()
        self._pipeline = Pipeline.load(bundle, options=self._options)
        seconds = perf_counter() - begin
        self._clocks = {name: timed(session) for name, session in self._pipeline.sessions.items()}
        self._clocked = self._pipeline.with_sessions(self._clocks)
        return {"seconds": seconds, "peak_bytes": peak_bytes(), "chosen": self._pipeline.chosen}

    def draw(self, case: Mapping[str, int], prompts: list[str], seed: int) -> dict[str, Any]:
        """Draw pictures from texts to pixels.

        Returns:
            the seconds of the whole, the runs of every stage as [seconds, shapes of its inputs], and the largest memory
            so far, in the process and on the GPU.
        """
        assert self._clocked is not None and self._pipeline is not None
        for clock in self._clocks.values():
            clock.runs.clear()
        request = _request(self._clocked, case, prompts, seed)
        begin = perf_counter()
        self._clocked.draw(request)
        seconds = perf_counter() - begin
        device = self._pipeline.device
        return {
            "seconds": seconds,
            "stages": {
                name: [[run.seconds, run.shapes] for run in clock.runs]
                for name, clock in self._clocks.items()
            },
            "kinds": {name: clock.device.kind for name, clock in self._clocks.items()},
            "peak_bytes": peak_bytes(),
            "gpu_peak_bytes": None if device is None else device.peak_bytes,
        }

    def profile(self, case: Mapping[str, int], prompts: list[str]) -> dict[str, Any]:
        """Run every stage alone, with its library's profiler on, on the first inputs that it gets in a drawing.

        Returns:
            by stage, the seconds of a run, and the executed nodes in order, as the fields of `ExecutedNode`.
        """
        assert self._pipeline is not None
        catchers = {name: FirstInputs(session) for name, session in self._pipeline.sessions.items()}
        self._pipeline.with_sessions(catchers).draw(_request(self._pipeline, case, prompts, 0))
        artifacts, _ = choose_here(self._bundle, self._pipeline.manifest, self._options)
        return {
            name: profile_stage(
                self._bundle, artifacts[name], self._options, catcher.feeds, self._pipeline.device
            )
            for name, catcher in catchers.items()
            if catcher.feeds is not None
        }

    def close(self) -> None:
        """Close the sessions."""
        if self._pipeline is not None:
            self._pipeline.close()


def _request(pipeline: Pipeline, case: Mapping[str, int], prompts: list[str], seed: int) -> Request:
    """The request of a drawing, with a control picture where the bundle has a ControlNet."""
    return Request(
        control_image=example_picture() if pipeline.drawable.has_controlnet else None,
        prompt=prompts,
        seed=seed,
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        use_resolution_binning=False,  # the size that was asked for is what is measured
        allow_uniform=True,
        strict=True,
    )


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # ctrl-C reaches all processes of the terminal
        code = 130
    sys.exit(code)
