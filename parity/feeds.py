"""What every stage is fed while one picture is drawn: real inputs for checks that look at one stage alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ditc.parity.cases import Case, CaseRun, Settings, forced_state, start_case
from ditc.runtime import denoise
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array, ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.spec import DENOISER, StageSpec


class Recorder:
    """A session that remembers what it was first fed."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.spec: StageSpec = session.spec
        self.device: ComputeDevice = session.device
        self.feeds: dict[str, Array] | None = None

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run, and keep the first feeds."""
        if self.feeds is None:
            self.feeds = {name: to_numpy(feed).copy() for name, feed in feeds.items()}
        return self.session.run(feeds)

    def close(self) -> None:
        """The session belongs to another."""


def record_feeds(
    pipeline: Pipeline, settings: Settings, run: CaseRun, step: int
) -> dict[str, dict[str, Array]]:
    """The feeds of every stage: the prompt's texts, the denoiser at `step` of `run`, the picture of the run's end."""
    recorders = {name: Recorder(session) for name, session in pipeline.sessions.items()}
    recording = pipeline.with_sessions(recorders)
    case: Case = run.case
    plan, start = start_case(recording, case, settings, run.latents[0])
    forced = (
        forced_state(run, start, step) if run.x0 is not None else replace(start, latents=run.latents[step])
    )
    if run.x0 is None:
        forced = replace(forced, step_index=step)
    denoise.step(recording.sessions[DENOISER], [forced])
    recording.decode([replace(start, latents=run.latents[-1])], plan)
    return {name: recorder.feeds for name, recorder in recorders.items() if recorder.feeds is not None}
