"""Record what every stage is fed while one picture is drawn: real inputs for checks of a single stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ditc.parity.cases import Case, CaseRun, Settings, finished_state, forced_state, start_case
from ditc.runtime import denoise
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.spec import StageSpec


class Recorder:
    """A session that keeps the feeds of its first run."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.spec: StageSpec = session.spec
        self.device: ComputeDevice = session.device
        self.feeds: dict[str, Array] | None = None

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the session; keep the feeds of the first run."""
        if self.feeds is None:
            self.feeds = {name: to_numpy(feed).copy() for name, feed in feeds.items()}
        return self.session.run(feeds)

    def close(self) -> None:
        """Do nothing: the caller owns the session."""


def record_feeds(
    pipeline: Pipeline, settings: Settings, run: CaseRun, step: int
) -> dict[str, dict[str, Array]]:
    """The feeds of every stage that runs for one case, by stage.

    The text stages get the case's prompt, the denoiser and a ControlNet the latents of `run` before `step`, and the
    decoder the last latents of `run`.
    """
    recorders = {name: Recorder(session) for name, session in pipeline.sessions.items()}
    recording = pipeline.with_sessions(recorders)
    case: Case = run.case
    plan, start = start_case(recording, case, settings, run.noise)
    forced = start
    if run.x0 is not None:
        forced = forced_state(run, start, step)
    elif step:
        forced = replace(start, latents=run.latents[step], step_index=step)
    denoise.step(recording.stepper, [forced])
    recording.decode([finished_state(run, start)], plan)
    return {name: recorder.feeds for name, recorder in recorders.items() if recorder.feeds is not None}
